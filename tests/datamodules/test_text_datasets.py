"""What a training sample is, where recall stands, and that any part of the stream comes out alike."""

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.loader import BatchIndex
from datamodules.packing import IGNORED, TextBatch, TokenStream, cut_windows
from datamodules.recall_sequences import RecallSequences, RecallSource
from datamodules.text_datasets import TextWindows, TrainingMixture
from theria.tasks.recall import RecallSpec

END = 1000
LENGTH = 32
FIRST_KEY, FIRST_VALUE = END + 1, END + 21
SPEC = RecallSpec(
    length=LENGTH,
    min_pairs=2,
    max_pairs=6,
    queries=2,
    query_span=8,
    first_key=FIRST_KEY,
    num_keys=20,
    first_value=FIRST_VALUE,
    num_values=8,
    num_noise=END,
)


def stream(first: int, documents: int, size: int) -> TokenStream:
    """Documents of which every token is another number, from `first` on."""
    numbers = torch.arange(first, first + documents * size).split(size)
    return TokenStream.of(list(numbers), [size] * documents, end=END, dtype=torch.int32)


STREAMS = (stream(0, 3, 100), stream(400, 5, 40))


def mixture(**changes: Any) -> TrainingMixture:
    options: dict[str, Any] = {
        "recall": RecallSource(SPEC, STREAMS, [Fraction(1, 2)] * 2, "train", 7),
        "recall_share": Fraction(1, 4),
        "length": LENGTH,
        "batch_size": 8,
        "samples_per_epoch": 24,
        "seed": 7,
    }
    return TrainingMixture(STREAMS, [Fraction(2, 3), Fraction(1, 3)], **options | changes)


def rows(batch: TextBatch) -> list[list[Any]]:
    """Everything of each sample."""
    return [[part[row].tolist() for part in batch] for row in range(len(batch.tokens))]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 3),
    st.lists(st.integers(0, 23), min_size=1, max_size=6, unique=True),
    st.integers(1, 4),
)
def test_a_sample_is_a_function_of_seed_epoch_and_number(epoch: int, wanted: list[int], step: int) -> None:
    """Whatever it is asked together with, by whom, in what order and after what."""
    once, worn = mixture(), mixture()
    whole = [row for first in (0, 8, 16) for row in rows(once[BatchIndex(epoch, range(first, first + 8))])]
    for other in (3, 0, epoch):
        worn[BatchIndex(other, range(wanted[0], 24, step))]
    for i in wanted:
        assert rows(worn[BatchIndex(epoch, range(i, i + 1))]) == [whole[i]]
    assert rows(worn[BatchIndex(epoch, range(wanted[0], 24, step))]) == whole[wanted[0] :: step]


def test_another_seed_or_epoch_is_another_sample() -> None:
    index = BatchIndex(0, range(8))
    base = rows(mixture()[index])
    assert rows(mixture(seed=8)[index]) != base
    assert rows(mixture()[BatchIndex(1, range(8))]) != base
    assert [row[:2] for row in base] != [row[:2] for row in rows(mixture()[BatchIndex(0, range(8, 16))])]


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 8), Fraction(1, 3), Fraction(1)])
def test_every_batch_holds_its_share_of_every_kind(share: Fraction) -> None:
    data = mixture(recall_share=share)
    seen: Counter[int] = Counter()
    for epoch in range(4):
        for first in (0, 8, 16):
            batch = data[BatchIndex(epoch, range(first, first + 8))]
            counts = Counter(batch.source.tolist())
            seen += counts
            assert abs(counts[2] - 8 * share) <= 1
            assert abs(counts[0] - 8 * (1 - share) * Fraction(2, 3)) <= 2
    assert abs(seen[2] - 96 * share) <= 1
    assert abs(seen[0] - 96 * (1 - share) * Fraction(2, 3)) <= 2


def test_every_rank_of_several_gets_every_kind() -> None:
    """Shares that repeat as often as ranks take turns would give one rank all of one kind."""
    data = mixture(batch_size=4, samples_per_epoch=400)
    for rank in range(4):
        found = Counter(
            source
            for first in range(0, 400, 4)
            for source in data[BatchIndex(0, range(first + rank, first + 4, 4))].source.tolist()
        )
        assert 10 <= found[2] <= 40
        assert found[0] > found[1] > 10


def test_a_pass_reads_every_token_once_before_any_again() -> None:
    """Pass after pass in another order and cut elsewhere, less the remainder that fills no window."""
    # batches of one are not shuffled, so their order is that of the passes
    data = mixture(recall=None, recall_share=Fraction(0), batch_size=1)
    read: list[list[list[int]]] = [[], []]
    for epoch in range(4):
        batch = data[BatchIndex(epoch, range(24))]
        for source, tokens in zip(batch.source.tolist(), batch.tokens.tolist(), strict=True):
            read[source].append(tokens)
    windows = [len(s) // LENGTH for s in STREAMS]
    for source, order in enumerate(read):
        first_pass, second_pass = order[: windows[source]], order[windows[source] : 2 * windows[source]]
        assert len(second_pass) == windows[source]
        for turn in (first_pass, second_pass):
            counts = Counter(t for tokens in turn for t in tokens if t != END)
            assert set(counts.values()) == {1}
            assert len(counts) > (windows[source] - 1) * LENGTH - 10
        # shuffled: hardly a window follows the one that stands before it in the text
        for turn in (first_pass, second_pass):
            heads = [tokens[0] if tokens[0] != END else tokens[1] for tokens in turn]
            steps = [(b - a) % (len(heads) * LENGTH) for a, b in itertools.pairwise(heads)]
            assert sum(abs(step - LENGTH) <= 2 for step in steps) < len(steps) / 2
        assert first_pass != second_pass
        assert sorted(first_pass) != sorted(second_pass)


def test_text_is_the_window_of_the_stream_and_recall_is_marked() -> None:
    data = mixture()
    batch = data[BatchIndex(2, range(8, 16))]
    assert batch.sample_ids.tolist() == list(range(8, 16))
    assert set(batch.source.tolist()) == {0, 1, 2}
    for row, source in enumerate(batch.source.tolist()):
        tokens, labels = batch.tokens[row], batch.labels[row]
        if source == 2:
            answers = (labels >= FIRST_VALUE) & (labels < FIRST_VALUE + 8)
            assert torch.equal(batch.recall_mask[row], answers)
            assert torch.equal(batch.recall_mask[row], labels != IGNORED)
            assert int(answers.sum()) == 2
            assert batch.num_bytes[row] == 0
            assert batch.segment_ids[row].unique().tolist() == [0]
            # the answer stands where a model reads it next, behind its key, and was stored with that key
            for place in answers.nonzero()[:, 0].tolist():
                assert tokens[place + 1] == labels[place]
                pairs = [(int(a), int(b)) for a, b in itertools.pairwise(tokens[: LENGTH - 7])]
                assert (int(tokens[place]), int(labels[place])) in pairs
        else:
            assert not batch.recall_mask[row].any()
            places = [
                place for place in range(len(STREAMS[source])) if STREAMS[source].tokens[place] == tokens[1]
            ]
            found = [
                cut_windows(STREAMS[source], torch.tensor([p - 1]), LENGTH, pad=False) for p in places if p
            ]
            assert any(
                torch.equal(w.tokens[0], tokens)
                and torch.equal(w.labels[0], labels)
                and torch.equal(w.segment_ids[0], batch.segment_ids[row])
                and int(w.num_bytes[0]) == int(batch.num_bytes[row])
                for w in found
            )


@pytest.mark.parametrize("filler", ["text", "noise"])
def test_filler_is_running_text_or_noise(filler: str) -> None:
    source = RecallSource(SPEC, STREAMS if filler == "text" else [], [Fraction(1), Fraction(0)], "train", 7)
    tokens, labels, _ = source.sample(0, torch.arange(50))
    steps = []
    for row in tokens.tolist():
        pairs = [(a, b) for a, b in itertools.pairwise(row) if max(a, b) < END]
        steps += [b == a + 1 for a, b in pairs]
    assert steps
    if filler == "text":
        assert all(steps)
        assert int(tokens[tokens < END].max()) < 300  # the only domain with a share
        assert len({int(row[row < END].min()) for row in tokens}) > 20
    else:
        assert sum(steps) < 0.1 * len(steps)
    assert (labels != IGNORED).sum() == 100


def test_filler_comes_from_domains_by_their_share() -> None:
    source = RecallSource(SPEC, STREAMS, [Fraction(3, 4), Fraction(1, 4)], "train", 7)
    tokens, _, _ = source.sample(0, torch.arange(400))
    text = tokens.masked_fill(tokens >= END, -1).amax(1)
    assert 0.68 < (text < 300).float().mean() < 0.82


def test_recall_of_other_streams_epochs_and_seeds_is_other() -> None:
    ids = torch.arange(4)
    base = RecallSource(SPEC, [], [], "train", 7)
    seen = [
        base.sample(0, ids)[0],
        base.sample(1, ids)[0],
        RecallSource(SPEC, [], [], "validation", 7).sample(0, ids)[0],
        RecallSource(SPEC, [], [], "train", 8).sample(0, ids)[0],
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_recall_in_training_is_new_in_every_epoch() -> None:
    data = mixture(recall_share=Fraction(1))
    batches = [data[BatchIndex(epoch, range(8))] for epoch in range(3)]
    pairs = {str(batch.labels[row].tolist()) for batch in batches for row in range(8)}
    assert len(pairs) == 24


def test_text_windows_cover_a_split_once() -> None:
    data = TextWindows(STREAMS[0], 0, length=LENGTH, limit=None)
    batches = [data[BatchIndex(0, range(i, min(i + 4, len(data))))] for i in range(0, len(data), 4)]
    labels = torch.cat([batch.labels for batch in batches])
    text = [t for t in labels.flatten().tolist() if t not in (IGNORED, END)]
    assert text == list(range(300))
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == 300
    assert {s for batch in batches for s in batch.source.tolist()} == {0}
    assert [i for batch in batches for i in batch.sample_ids.tolist()] == list(range(10))


@pytest.mark.parametrize("limit", [1, 3, 7, 10, 50])
def test_a_limit_spreads_windows_over_the_split(limit: int) -> None:
    whole = rows(TextWindows(STREAMS[0], 0, length=LENGTH, limit=None)[BatchIndex(0, range(10))])
    data = TextWindows(STREAMS[0], 0, length=LENGTH, limit=limit)
    assert len(data) == min(limit, 10)
    found = rows(data[BatchIndex(0, range(len(data)))])
    places = [next(i for i, w in enumerate(whole) if w[:6] == row[:6]) for row in found]
    assert places == sorted(set(places))
    assert places == [i * 10 // len(data) for i in range(len(data))]


@pytest.mark.parametrize("control", ["none", "never_stored", "previous_shard"])
def test_controls_ask_what_cannot_be_known(control: Any) -> None:
    source = RecallSource(SPEC, STREAMS, [Fraction(1, 2)] * 2, "test", 7)
    batch = RecallSequences(source, 2, count=6, control=control)[BatchIndex(0, range(6))]
    for tokens, labels, shards in zip(batch.tokens, batch.labels, batch.segment_ids, strict=True):
        stored = {
            (int(k), int(v))
            for k, v in itertools.pairwise(tokens[: LENGTH - 7])
            if FIRST_KEY <= int(k) < FIRST_VALUE <= int(v)
        }
        asked = {(int(tokens[p]), int(labels[p])) for p in (labels != IGNORED).nonzero()[:, 0]}
        keys = {key for key, _ in stored}
        if control == "never_stored":
            assert not keys & {key for key, _ in asked}
        else:
            assert {key for key, _ in asked} <= keys
        assert (asked <= stored) == (control != "never_stored")
        boundary = LENGTH - 8
        assert shards.tolist() == [0] * boundary + [int(control == "previous_shard")] * 8
    assert torch.equal(batch.recall_mask, batch.labels != IGNORED)
    assert batch.source.tolist() == [2] * 6
