"""Recall sequences: their layout, their purity, their statistics, and that controls cannot be answered."""

import dataclasses

import pytest
import scipy.stats
import torch

from theria.tasks.recall import IGNORED, RecallBatch, RecallSpec, answer_distances, sample_recall
from theria.tasks.synthetic_seqcls import STREAMS

SMALL = RecallSpec(
    length=96,
    min_pairs=4,
    max_pairs=12,
    queries=3,
    query_span=20,
    min_distance=14,
    first_key=100,
    num_keys=16,
    first_value=200,
    num_values=8,
    num_noise=50,
)


def sample(spec=SMALL, ids=range(32), **coordinates) -> RecallBatch:
    settings = {"seed": 0, "epoch": 0, "stream": "train"} | coordinates
    return sample_recall(spec, torch.tensor(list(ids)), **settings)


def assert_equal(first, second):
    for name, a, b in zip(RecallBatch._fields, first, second, strict=True):
        assert torch.equal(a, b), name


def is_key(tokens, spec=SMALL):
    return (tokens >= spec.first_key) & (tokens < spec.first_key + spec.num_keys)


def is_value(tokens, spec=SMALL):
    return (tokens >= spec.first_value) & (tokens < spec.first_value + spec.num_values)


def stored_pairs(tokens, spec=SMALL):
    """{key: (value, position of the value)} of the first tokens, read off one by one."""
    pairs = {}
    for t in range(spec.pair_span):
        if is_key(tokens[t], spec):
            assert tokens[t].item() not in pairs
            assert is_value(tokens[t + 1], spec)
            pairs[tokens[t].item()] = (tokens[t + 1].item(), t + 1)
    return pairs


@pytest.mark.parametrize("spec", [SMALL, RecallSpec(), RecallSpec(length=2048, min_distance=500)])
def test_every_answer_is_the_value_stored_with_its_key(spec):
    batch = sample(spec, range(8))
    for b in range(8):
        tokens, labels = batch.tokens[b], batch.labels[b]
        pairs = stored_pairs(tokens, spec)
        assert len(pairs) == batch.num_pairs[b]
        asked = (labels != IGNORED).nonzero().flatten().tolist()
        assert sorted(batch.query_positions[b].tolist()) == asked
        assert len({tokens[t].item() for t in asked}) == len(asked) == spec.queries
        for query, value_position in zip(
            batch.query_positions[b].tolist(), batch.value_positions[b].tolist(), strict=True
        ):
            value, position = pairs[tokens[query].item()]
            assert (value, position) == (labels[query].item(), value_position)
            assert tokens[query + 1] == value
            assert query - position > spec.min_distance
            assert query >= spec.length - spec.query_span
        # nothing else is a key or a value
        assert is_key(tokens, spec).sum() == is_value(tokens, spec).sum() == len(pairs) + spec.queries
    assert not batch.segment_ids.any()
    assert int(batch.tokens.max()) < spec.vocab


def test_filler_stands_where_nothing_else_does():
    plain = sample()
    filler = torch.full((32, SMALL.length), 77)
    filled = sample(filler=filler)
    written = is_key(plain.tokens) | is_value(plain.tokens)
    assert torch.equal(filled.tokens[written], plain.tokens[written])
    assert (filled.tokens[~written] == 77).all()
    assert (plain.tokens[~written] < SMALL.num_noise).all()
    assert torch.equal(filled.labels, plain.labels)
    assert (filler == 77).all()


def test_keys_that_were_never_stored():
    batch, plain = sample(control="never_stored"), sample()
    for b in range(32):
        assert not set(batch.tokens[b, batch.query_positions[b]].tolist()) & set(
            stored_pairs(batch.tokens[b])
        )
    assert (batch.value_positions == -1).all()
    assert torch.equal(batch.query_positions, plain.query_positions)
    assert torch.equal(batch.tokens[:, : SMALL.pair_span], plain.tokens[:, : SMALL.pair_span])
    assert is_value(batch.labels[batch.labels != IGNORED]).all()


def test_needles_in_the_previous_shard():
    batch, plain = sample(control="previous_shard"), sample()
    assert torch.equal(batch.tokens, plain.tokens)
    queried, stored = (
        batch.segment_ids.gather(1, positions) for positions in (batch.query_positions, batch.value_positions)
    )
    assert (queried == 1).all()
    assert (stored == 0).all()
    assert (batch.segment_ids.diff(dim=1) >= 0).all()


def test_what_a_control_leaves_visible_does_not_tell_the_answer():
    # the best a model can do without the pair is to guess: a value it has seen is no better than another
    spec = dataclasses.replace(SMALL, max_pairs=4)
    batch = sample(spec, range(4000), control="never_stored")
    pairs = batch.tokens[:, : spec.pair_span]
    answers = batch.labels.gather(1, batch.query_positions[:, :1])
    seen = (pairs == answers).any(dim=1)
    other = spec.first_value + (answers - spec.first_value + 1) % spec.num_values
    control = (pairs == other).any(dim=1)
    assert abs(int(seen.sum()) - int(control.sum())) < 4 * (2 * 4000 * 0.25) ** 0.5


def test_a_sequence_is_bit_equal_alone_and_in_any_batch():
    whole = sample(ids=range(16), seed=5, epoch=2)
    for ids in ([11], [9, 2, 14], range(15, -1, -1)):
        part = sample(ids=ids, seed=5, epoch=2)
        assert_equal(part, RecallBatch(*(field[torch.tensor(list(ids))] for field in whole)))


def test_sequences_differ_by_stream_epoch_seed_and_id():
    ids = [0, 1, 2**32 - 1]
    rows = [
        row
        for stream in STREAMS
        for epoch in (0, 1, 2**32 - 1)
        for seed in (0, 1, 2**64 - 1)
        for row in sample(ids=ids, stream=stream, epoch=epoch, seed=seed).tokens
    ]
    stacked = torch.stack(rows)
    assert len(stacked.unique(dim=0)) == len(stacked) == 81


def test_global_random_state_is_neither_read_nor_changed():
    state = torch.random.get_rng_state()
    first = sample()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert_equal(sample(), first)


def test_nothing_is_read_back_from_the_device():
    # A tensor on the meta device has no values: looking at one raises.
    for control in ("none", "never_stored", "previous_shard"):
        batch = sample_recall(
            SMALL, torch.arange(3, device="meta"), seed=0, epoch=0, stream="train", control=control
        )
        assert batch.tokens.shape == batch.labels.shape == batch.segment_ids.shape == (3, SMALL.length)


def test_counts_positions_keys_and_values_are_uniform():
    batch = sample(ids=range(3000), seed=3)

    def assert_uniform(numbers, choices):
        counts = torch.bincount(numbers.flatten(), minlength=choices)
        assert len(counts) == choices
        assert scipy.stats.chisquare(counts).pvalue > 1e-3

    assert_uniform(batch.num_pairs - SMALL.min_pairs, SMALL.max_pairs - SMALL.min_pairs + 1)
    slots = SMALL.pair_span // 2
    assert_uniform(batch.value_positions[:, 0] // 2, slots)
    start = SMALL.length - SMALL.query_span
    assert_uniform((batch.query_positions[:, 0] - start) // 2, SMALL.query_span // 2)
    first = batch.query_positions[:, :1]
    assert_uniform(batch.tokens.gather(1, first) - SMALL.first_key, SMALL.num_keys)
    assert_uniform(batch.labels.gather(1, first) - SMALL.first_value, SMALL.num_values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 5}, "queries <= min_pairs <= max_pairs <= num_keys, received 5, 4, 12, 16"),
        ({"max_pairs": 17}, "received 3, 4, 17, 16"),
        ({"query_span": 5}, "3 queries need 6 tokens of query_span 5"),
        ({"length": 57}, "12 pairs need 24 tokens of the 23 that length 57 leaves"),
        ({"min_distance": -1}, "min_distance, first_key and first_value must be at least 0"),
        ({"num_noise": 0}, "num_noise at least 1"),
        ({"first_value": 115}, "keys and values must be different tokens"),
        ({"num_values": 1}, "at least 2 values"),
    ],
)
def test_specifications_that_make_no_sequence_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": "testing"}, "received 'testing' and 'none'"),
        ({"control": "off"}, "control one of none, never_stored, previous_shard, received 'train' and 'off'"),
        ({"epoch": -1}, r"epoch must be in \[0, 2\^32\), received -1"),
        ({"seed": -1}, "Philox key"),
    ],
)
def test_wrong_requests_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sample(**change)


def test_never_stored_needs_keys_to_spare():
    spec = dataclasses.replace(SMALL, num_keys=14)
    with pytest.raises(ValueError, match="needs max_pairs \\+ queries = 15 keys, the specification has 14"):
        sample(spec, control="never_stored")


@pytest.mark.parametrize("control", ["none", "previous_shard", "never_stored"])
def test_distances_are_those_of_the_sampler(control):
    spec = dataclasses.replace(SMALL, num_noise=100)
    batch = sample(spec, control=control)
    found = answer_distances(batch.tokens, batch.labels)
    stored = batch.value_positions >= 0
    expected = torch.where(stored, batch.query_positions - batch.value_positions, -1)
    assert torch.equal(found.gather(1, batch.query_positions), expected)
    elsewhere = torch.ones_like(found, dtype=torch.bool).scatter(1, batch.query_positions, False)
    assert bool((found[elsewhere] == -1).all())


def test_batches_without_queries_have_no_distances():
    tokens = torch.randint(50, (2, 7))
    assert bool((answer_distances(tokens, torch.full_like(tokens, IGNORED)) == -1).all())
