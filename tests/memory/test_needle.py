"""The needle in a memory: against a loop over tokens, against theory, and in memories that are broken."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import theria.memory.projection as projection_module
from theria.memory import MemoryBranch
from theria.memory.needle import (
    CAPACITY_PAIRS,
    Haystack,
    Mean,
    draw_haystack,
    memory_branches,
    probe_memories,
    read_needle,
)
from theria.memory.needle_theory import delta_cosine, hebbian_cosine

RULES = ["hebbian", "delta", "gated_delta"]


def memory(
    rule="delta", *, dim=64, heads=2, share=None, chunk_size=64, kernel="tensor", seed=0
) -> MemoryBranch:
    torch.manual_seed(seed)
    built = MemoryBranch(
        8, heads=heads, dim=dim, rule=rule, slots=64, taps=4, chunk_size=chunk_size, kernel=kernel
    )
    if share is not None:
        with torch.no_grad():
            built.share_logit.fill_(math.log(share / (1 - share)))
    return built


def haystack(repetitions=24, *, heads=2, pairs=100, dim=64, seed=0) -> Haystack:
    return draw_haystack(repetitions, heads, pairs, dim, seed=seed)


def token_by_token(built, hay, pairs):
    """Cosines of what both keys read, by the equations, a pair after the other; and the needle's place."""
    persistent = built.projection.persistent
    cosines = torch.zeros(2, len(hay.depth), built.heads).double()
    places = []
    for r, depth in enumerate(hay.depth.tolist()):
        place = math.floor(depth * (pairs + 1))
        places.append(place)
        for h in range(built.heads):
            written = [(hay.keys[r, h, i], hay.values[r, h, i]) for i in range(pairs)]
            written.insert(place, (hay.needle[0, r, h], hay.needle[1, r, h]))
            m, norm = persistent.m_persistent[h], persistent.norm_persistent[h]
            s = torch.zeros_like(m)
            for key, value in written:
                m, norm = m + torch.outer(key, key), norm + key @ key
                if built.decay is not None:
                    s = s * torch.sigmoid(built.decay.bias[h] + 4) ** (1 / 16)
                kept = s if built.memory.rule == "hebbian" else s - torch.outer(s @ key, key)
                s = kept + torch.outer(value, key)
            for kind, asked in enumerate((hay.needle[0, r, h], hay.unknown[r, h])):
                projected = built.projection.scale[h] * (m @ asked) / norm
                read = s @ ((1 - built.share[h]) * asked + built.share[h] * projected)
                cosines[kind, r, h] = F.cosine_similarity(read, hay.needle[1, r, h], dim=0)
    return cosines, places


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("share", [0.05, 0.7])
def test_it_reads_what_the_equations_read(rule, share):
    built = memory(rule, dim=6, share=share, chunk_size=4).double()
    with torch.no_grad():
        built.projection.persistent.vectors.add_(0.3)
        built.projection.relative_scale.copy_(torch.tensor([0.7, 1.3]))
    hay = haystack(5, pairs=11, dim=6).like(built)
    for pairs in (1, 7, 11):
        found = read_needle(built, hay, pairs=pairs)
        expected, places = token_by_token(built, hay, pairs)
        torch.testing.assert_close(found.stored, expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.never_stored, expected[1], rtol=1e-9, atol=1e-9)
        assert 0 <= min(places) < max(places) <= pairs


def test_it_asks_the_code_that_trains(monkeypatch):
    calls = []
    original = projection_module.causal_read

    def watched(rule, *tensors, **options):
        calls.append((rule, options["chunk_size"], options["kernel"]))
        return original(rule, *tensors, **options)

    monkeypatch.setattr(projection_module, "causal_read", watched)
    built = memory("gated_delta", dim=8, chunk_size=16, kernel="auto")
    probe_memories([built], haystack(2, pairs=5, dim=8), pairs=5)
    assert calls == [("hebbian", 16, "auto"), ("gated_delta", 16, "auto")]


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("share", [1e-6, 0.05, 0.5, 1 - 1e-6])
def test_the_hebbian_rule_gives_back_what_theory_says(dim, share):
    built = memory("hebbian", dim=dim, share=share)
    hay = haystack(96 if dim == 64 else 32, dim=dim)
    found = probe_memories([built], hay, pairs=100)
    close = 0.015 if dim == 256 else 0.025
    assert found.theory == pytest.approx(found.cosine.value, abs=close)
    few = probe_memories([built], hay, pairs=10)
    assert few.theory == pytest.approx(few.cosine.value, abs=close)
    assert few.cosine.value > found.cosine.value + 0.1


def test_persistent_vectors_are_part_of_the_theory():
    built = memory("hebbian", share=0.5)
    plain = probe_memories([built], haystack(96), pairs=50)
    with torch.no_grad():
        built.projection.persistent.vectors.mul_(10)
    found = probe_memories([built], haystack(96), pairs=50)
    assert abs(found.cosine.value - plain.cosine.value) > 0.02
    assert found.theory == pytest.approx(found.cosine.value, abs=0.015)


@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
@pytest.mark.parametrize("dim", [64, 256])
def test_the_delta_rule_gives_back_what_theory_says(rule, dim):
    built = memory(rule, dim=dim, share=1e-6)
    if rule == "gated_delta":
        with torch.no_grad():
            built.decay.bias.copy_(torch.tensor([-3.0, -1.0]))  # half forgotten after 33 tokens and 227
    hay = haystack(96 if dim == 64 else 32, pairs=150, dim=dim)
    for pairs in (10, 50, 150):
        found = probe_memories([built], hay, pairs=pairs)
        assert found.theory == pytest.approx(found.cosine.value, abs=0.02)


def test_under_the_delta_rule_theory_bounds_reads_with_a_share():
    for share in (0.05, 0.5, 1 - 1e-6):
        found = probe_memories([memory(share=share)], haystack(96), pairs=50)
        assert found.cosine.high < found.theory + 0.02


def test_an_old_needle_is_lost_under_the_delta_rule_alone():
    rho = 1 - 1 / 64
    counts = torch.tensor([0, 40, 80])
    delta = delta_cosine(80 - counts, counts, 64, decay=torch.ones(1))[:, 0]
    closed = [rho**m / math.sqrt(1 - rho**80 * (1 - rho**m)) for m in counts.tolist()]
    assert delta.tolist() == pytest.approx(closed, rel=1e-6)
    assert delta[0] == 1
    reads = read_needle(memory("hebbian"), haystack(40), pairs=80)
    old, new = reads.stored[:10].mean(), reads.stored[-10:].mean()
    assert abs(old - new) < 0.1
    reads = read_needle(memory("delta"), haystack(40), pairs=80)
    assert reads.stored[-10:].mean() - reads.stored[:10].mean() > 0.3


@pytest.mark.parametrize(("dim", "expected"), [(256, 0.85), (64, 0.62)])
def test_a_hundred_pairs_are_what_a_width_holds(dim, expected):
    none = torch.zeros(1)
    plain = {"share": none, "scale": none, "norm_persistent": none}
    found = hebbian_cosine(torch.tensor([100]), dim, m_persistent=torch.zeros(1, dim, dim), **plain)
    assert found.item() == pytest.approx(expected, abs=0.005)
    assert found.item() == pytest.approx(1 / math.sqrt(1 + 100 / dim), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_curve_falls_and_a_key_never_stored_reads_nothing(rule):
    built = [memory(rule, dim=256, seed=seed) for seed in (0, 1)]
    hay = haystack(16, pairs=200, dim=256)
    curve = [probe_memories(built, hay, pairs=pairs) for pairs in CAPACITY_PAIRS]
    values = [point.cosine.value for point in curve]
    assert values == sorted(values, reverse=True)
    assert [point.pairs for point in curve] == list(CAPACITY_PAIRS) == [10, 25, 50, 100, 200]
    assert values[3] > 0.8 > values[4]
    for point in curve:
        assert point.cosine.low < point.cosine.value < point.cosine.high
        assert not point.leaks
        assert abs(point.never_stored.value) < 0.1
        assert point.passes(0.8) == (point.pairs <= 100)


# memories that are broken


def broken(built: MemoryBranch, change) -> MemoryBranch:
    """The memory with ``change(read, inputs)`` in place of what it reads."""
    original = built.write_and_read

    def spoilt(q, k, v, **options):
        read, *states = original(*change.inputs(q, k, v), **options)
        return (change.read(read), *states)

    built.write_and_read = spoilt
    return built


def fault(inputs=lambda q, k, v: (q, k, v), read=lambda read: read) -> SimpleNamespace:
    return SimpleNamespace(inputs=inputs, read=read)


FAULTS = {
    "values are never stored": fault(inputs=lambda q, k, v: (q, k, torch.zeros_like(v))),
    "keys are never stored": fault(inputs=lambda q, k, v: (q, torch.zeros_like(k), v)),
    "other values are stored": fault(inputs=lambda q, k, v: (q, k, v.roll(1, dims=2))),
    "nothing is asked": fault(inputs=lambda q, k, v: (torch.zeros_like(q), k, v)),
    "heads are mixed up": fault(read=lambda read: read.flip(1)),
    "one head forgets": fault(read=lambda read: read * torch.tensor([1.0, 0.0])[:, None, None]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_memory_that_does_not_store_fails(name):
    assert probe_memories([memory(dim=256)], haystack(dim=256), pairs=25).passes()
    found = probe_memories([broken(memory(dim=256), FAULTS[name])], haystack(dim=256), pairs=25)
    assert not found.passes()
    assert abs(found.worst) < 0.1


def test_one_broken_head_among_many_fails_where_the_mean_would_pass():
    built = [memory(dim=256, seed=seed) for seed in range(4)]
    broken(built[2], FAULTS["one head forgets"])
    found = probe_memories(built, haystack(dim=256), pairs=25)
    assert found.cosine.value > 0.8
    assert not found.passes()


def test_a_memory_that_gives_the_needle_to_any_key_fails():
    change = fault(read=lambda read: torch.cat((read[:, :, :-1], read[:, :, -2:-1]), dim=2))
    found = probe_memories([broken(memory(dim=256), change)], haystack(dim=256), pairs=25)
    assert found.worst > 0.8
    assert found.leaks
    assert not found.passes()


def test_a_probe_that_does_not_write_the_needle_is_noticed(monkeypatch):
    monkeypatch.setattr(
        "theria.memory.needle._inserted", lambda others, one, before: others[:, :, [0, *range(25)]]
    )
    found = probe_memories([memory(dim=256)], haystack(dim=256), pairs=25)
    assert abs(found.worst) < 0.2
    assert not found.passes()


def test_a_memory_without_numbers_fails():
    found = probe_memories(
        [broken(memory(), fault(read=lambda read: read * torch.nan))], haystack(), pairs=10
    )
    assert not found.passes()


# the rest


def test_vectors_are_of_their_seed_and_touch_no_generator():
    before = torch.get_rng_state()
    first, again, other = haystack(seed=1), haystack(seed=1), haystack(seed=2)
    probe_memories([memory(seed=3)], first, pairs=10)
    torch.manual_seed(3)
    assert not torch.equal(first.keys, other.keys)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.set_rng_state(before)
    haystack(seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_vectors_are_units_of_all_directions_and_depths_cover_everything():
    hay = haystack(50, pairs=40)
    for part in (hay.keys, hay.values, hay.needle, hay.unknown):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(part.shape[:-1]))
        assert part.flatten(0, -2).mean(dim=0).abs().max() < 0.05
    vectors = torch.cat((hay.needle.flatten(0, 2), hay.unknown.flatten(0, 1)))
    assert ((vectors @ vectors.T) - torch.eye(len(vectors))).abs().max() < 0.7
    assert ((hay.depth * 50).floor() == torch.arange(50)).all()


def test_it_changes_nothing_and_keeps_no_graph():
    built = memory()
    before = {name: p.detach().clone() for name, p in built.named_parameters()}
    reads = read_needle(built, haystack(2, pairs=5), pairs=5)
    assert not any(part.requires_grad for part in reads)
    for name, parameter in built.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_half_precision_is_that_of_the_memory():
    built = memory(dim=256)
    exact = probe_memories([built], haystack(dim=256), pairs=50)
    half = haystack(dim=256).like(built.to(torch.bfloat16))
    assert half.keys.dtype == torch.bfloat16
    assert half.depth.dtype == torch.float32
    found = probe_memories([built], half, pairs=50)
    assert found.cosine.value == pytest.approx(exact.cosine.value, abs=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = probe_memories([memory(dim=256)], haystack(dim=256), pairs=50)
    assert mixed.cosine.value == pytest.approx(exact.cosine.value, abs=0.01)


def test_means_have_student_s_interval():
    values = torch.tensor([0.2, 0.5, 0.6, 0.9], dtype=torch.float64)
    found = Mean.of(values)
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.value == pytest.approx(0.55)
    assert Mean.of(values[:1]) == Mean(0.2, -math.inf, math.inf)


def test_memories_are_found_in_their_order():
    first, second = memory(seed=0), memory(seed=1)
    assert memory_branches(nn.ModuleList([nn.Linear(1, 1), first, nn.Sequential(second)])) == [first, second]
    assert memory_branches(nn.Linear(1, 1)) == []


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match="at least one memory"):
        probe_memories([], haystack(), pairs=10)
    with pytest.raises(
        ValueError, match="2 heads of width 64 and at least pairs = 10 >= 1 pairs, received 3"
    ):
        read_needle(memory(), haystack(heads=3), pairs=10)
    with pytest.raises(ValueError, match="pairs = 101"):
        read_needle(memory(), haystack(), pairs=101)
    with pytest.raises(ValueError, match="repetitions must be at least 1"):
        haystack(0)
