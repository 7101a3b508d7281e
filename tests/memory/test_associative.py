"""The three write rules against a loop over tokens, in float64, and that pairs come back."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.memory import AssociativeMemory, AssociativeState, PersistentMemory, QKProjection

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
RULES = pytest.mark.parametrize("rule", ["hebbian", "delta", "gated_delta"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])


def options(rule, a):
    return {"beta": a.beta, "log_decay": a.log_decay if rule == "gated_delta" else None}


@RULES
@PACKED
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 37, 64])
def test_equals_a_loop_over_tokens(naive_memory, draw, rule, chunk_size, packed):
    a = draw()
    ids = a.segment_ids if packed else None
    memory = AssociativeMemory(rule, chunk_size=chunk_size)
    found, state = memory(a.q, a.k, a.v, segment_ids=ids, **options(rule, a))
    expected, last = naive_memory(rule, a.q, a.k, a.v, segment_ids=ids, **options(rule, a))
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(state.memory, last, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(["hebbian", "delta", "gated_delta"]),
    length=st.integers(1, 90),
    chunk_size=st.integers(1, 70),
    boundaries=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    cut=st.integers(0, 90),
    seed=st.integers(0, 2**16),
)
def test_lengths_chunks_boundaries_and_cuts(
    naive_memory, draw, rule, length, chunk_size, boundaries, cut, seed
):
    a = draw(batch=2, heads=1, length=length, dim=3, boundaries=boundaries, seed=seed)
    expected, last = naive_memory(rule, a.q, a.k, a.v, segment_ids=a.segment_ids, **options(rule, a))
    memory = AssociativeMemory(rule, chunk_size=chunk_size)
    cut = min(cut, length)
    parts, state = [], None
    for part in (slice(0, cut), slice(cut, length)):
        own = {name: None if t is None else t[:, :, part] for name, t in options(rule, a).items()}
        read, state = memory(
            *(t[:, :, part] for t in (a.q, a.k, a.v)),
            segment_ids=a.segment_ids[:, part],
            state=state,
            **own,
        )
        parts.append(read)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, **CLOSE)
    torch.testing.assert_close(state.memory, last, **CLOSE)


@RULES
@PACKED
def test_gradients_equal_the_loop_s(naive_memory, draw, rule, packed):
    a = draw(length=21, boundaries=0.2)
    start = torch.randn(2, 2, 4, 5).double()
    cotangents = torch.randn(2, 2, 21, 4), torch.randn(2, 2, 4, 5)
    own = {name: t for name, t in options(rule, a).items() if t is not None}

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (a.q, a.k, a.v, start, *own.values())]
        out, state = function(
            *leaves[:3],
            **dict(zip(own, leaves[4:], strict=True)),
            segment_ids=a.segment_ids - 7 if packed else None,
            state=AssociativeState(leaves[3]),
        )
        last = state.memory if isinstance(state, AssociativeState) else state
        total = (out * cotangents[0]).sum() + (last * cotangents[1]).sum()
        return torch.autograd.grad(total, leaves, materialize_grads=True)

    ours = gradients(AssociativeMemory(rule, chunk_size=4))
    loop = gradients(lambda *args, **kwargs: naive_memory(rule, *args, **kwargs))
    for found, expected in zip(ours, loop, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@RULES
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("boundary", [1, 8, 20])
def test_no_gradient_crosses_a_shard_boundary_and_all_cross_within(draw, rule, boundary, chunk_size):
    length = 21
    a = draw(batch=1, heads=1, length=length, dtype=torch.float32)
    ids = (torch.arange(length) >= boundary).long()[None]
    memory = AssociativeMemory(rule, chunk_size=chunk_size)
    for inside in (True, False):
        own = {name: t for name, t in options(rule, a).items() if t is not None}
        leaves = [t.clone().requires_grad_() for t in (a.k, a.v, *own.values())]
        out, state = memory(a.q, *leaves[:2], segment_ids=ids, **dict(zip(own, leaves[2:], strict=True)))
        if inside:
            total = out[:, :, :boundary].square().sum()
        else:
            total = out[:, :, boundary:].square().sum() + state.memory.square().sum()
        gradients = torch.autograd.grad(total, leaves)
        for gradient in gradients[:3] if inside else gradients:
            assert inside == bool(torch.count_nonzero(gradient[:, :, :boundary]))
        written = gradients[1]
        assert (written[:, :, :boundary] if inside else written[:, :, boundary:]).abs().sum(-1).min() > 0
        if rule == "gated_delta":
            # what a shard's first token would forget is not there
            assert torch.count_nonzero(gradients[3][0, 0, boundary]) == 0


@RULES
@pytest.mark.parametrize("chunk_size", [8, 64])
def test_float32_stays_within_rounding_of_float64(naive_memory, draw, rule, chunk_size):
    a = draw(batch=1, length=300, dim=16, boundaries=0.01)
    expected, last = naive_memory(rule, a.q, a.k, a.v, segment_ids=a.segment_ids, **options(rule, a))
    single = {name: None if t is None else t.float() for name, t in options(rule, a).items()}
    found, state = AssociativeMemory(rule, chunk_size=chunk_size)(
        a.q.float(), a.k.float(), a.v.float(), segment_ids=a.segment_ids, **single
    )
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert (state.memory - last).norm() < 1e-6 * last.norm()


def test_equal_keys_with_full_writes_stay_exact(draw):
    # the system of such a chunk is the worst conditioned one: all ones below the diagonal
    a = draw(batch=1, heads=1, length=64, dtype=torch.float32)
    k = a.k[:, :, :1].expand_as(a.k)
    read, _ = AssociativeMemory("delta", chunk_size=64)(k, k, a.v)
    torch.testing.assert_close(read, a.v, rtol=1e-5, atol=1e-5)


def test_strong_decays_do_not_overflow(naive_memory, draw):
    a = draw(length=70)
    strong = 40 * a.log_decay
    memory = AssociativeMemory("gated_delta", chunk_size=64)
    leaf = strong.clone().requires_grad_()
    found, _ = memory(a.q, a.k, a.v, beta=a.beta, log_decay=leaf)
    expected, _ = naive_memory("gated_delta", a.q, a.k, a.v, beta=a.beta, log_decay=strong)
    torch.testing.assert_close(found, expected, **CLOSE)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert gradient.isfinite().all()


@RULES
def test_a_batch_s_sequences_and_heads_never_mix(draw, rule):
    a = draw(batch=3)
    memory = AssociativeMemory(rule, chunk_size=8)
    whole, _ = memory(a.q, a.k, a.v, segment_ids=a.segment_ids, **options(rule, a))
    for b in range(3):
        for h in range(2):
            one = slice(b, b + 1), slice(h, h + 1)
            own = {name: None if t is None else t[one] for name, t in options(rule, a).items()}
            alone, _ = memory(a.q[one], a.k[one], a.v[one], segment_ids=a.segment_ids[one[0]], **own)
            torch.testing.assert_close(alone[0, 0], whole[b, h], **CLOSE)


@RULES
def test_second_derivatives_against_finite_differences(draw, rule):
    a = draw(batch=1, heads=1, length=5, dim=2, value_dim=2)
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    own = {name: t for name, t in options(rule, a).items() if t is not None}
    memory = AssociativeMemory(rule, chunk_size=2)

    def remember(q, k, v, start, *gates):
        named = dict(zip(own, gates, strict=True))
        out, state = memory(q, k, v, segment_ids=ids, state=AssociativeState(start), **named)
        return out, state.memory

    start = torch.randn(1, 1, 2, 2).double()
    leaves = tuple(t.clone().requires_grad_() for t in (a.q, a.k, a.v, start, *own.values()))
    assert torch.autograd.gradcheck(remember, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(remember, leaves, check_fwd_over_rev=True, fast_mode=True)


@RULES
def test_vmap_over_a_further_dimension(draw, rule):
    a, b = draw(seed=1), draw(seed=2)
    memory = AssociativeMemory(rule, chunk_size=8)
    names = ("q", "k", "v", "beta", *(("log_decay",) if rule == "gated_delta" else ()))
    stacked = {name: torch.stack((getattr(a, name), getattr(b, name))) for name in names}
    found = torch.func.vmap(lambda arguments: memory(**arguments)[0])(stacked)
    for each, one in zip(found, (a, b), strict=True):
        torch.testing.assert_close(each, memory(one.q, one.k, one.v, **options(rule, one))[0], **CLOSE)


@RULES
def test_states_are_float32_under_bfloat16_autocast_and_for_bfloat16_inputs(draw, rule):
    a = draw(dtype=torch.float32)
    memory = AssociativeMemory(rule)
    expected, plain = memory(a.q, a.k, a.v, **options(rule, a))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, state = memory(a.q, a.k, a.v, **options(rule, a))
    assert torch.equal(cast, expected)
    assert torch.equal(state.memory, plain.memory)
    low, state = memory(a.q.bfloat16(), a.k.bfloat16(), a.v.bfloat16(), **options(rule, a))
    assert low.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
    assert (low.float() - expected).norm() < 0.02 * expected.norm()


@RULES
def test_nothing_is_read_back_from_the_device(rule):
    # A tensor on the meta device has no values: looking at one raises.
    q, k, v = torch.zeros(3, 2, 3, 50, 4, device="meta")
    gate = torch.zeros(2, 3, 50, device="meta")
    ids = torch.zeros(2, 50, dtype=torch.int64, device="meta")
    own = {"beta": gate, "log_decay": gate if rule == "gated_delta" else None}
    memory = AssociativeMemory(rule, chunk_size=16)
    _, state = memory(q, k, v, segment_ids=ids, **own)
    assert memory(q, k, v, segment_ids=ids, state=state, **own)[0].shape == v.shape


def stored_and_read_back(rule: str, dim: int, pairs: int, *, project: bool) -> tuple[float, float]:
    """Mean cosine of what is read back with the value stored, and for keys that were never stored."""
    torch.manual_seed(0)
    trials = 48
    k = F.normalize(torch.randn(trials, 1, pairs, dim), dim=-1)
    v = F.normalize(torch.randn(trials, 1, pairs, dim), dim=-1)
    needle = torch.randint(pairs, (trials,))
    rows = torch.arange(trials)
    memory, projection = AssociativeMemory(rule), QKProjection(PersistentMemory(1, dim))
    _, stored = memory(k, k, v)
    _, seen = projection(k, k)
    cosines = []
    for key in (k[rows, 0, needle], F.normalize(torch.randn(trials, dim), dim=-1)):
        query, nothing = key[:, None, None], torch.zeros(trials, 1, 1, dim)
        if project:
            query, _ = projection(query, nothing, state=seen)
        read, _ = memory(query, nothing, nothing, state=stored)
        cosines.append(F.cosine_similarity(read[:, 0, 0], v[rows, 0, needle], dim=-1).mean().item())
    return cosines[0], cosines[1]


@pytest.mark.parametrize(("dim", "cosine"), [(256, 0.85), (64, 0.62)])
def test_the_hebbian_rule_reads_back_what_theory_says(dim, cosine):
    # among n random pairs the noise is sqrt((n - 1) / dim) of the value
    found, never = stored_and_read_back("hebbian", dim, 100, project=False)
    assert found == pytest.approx((1 + 99 / dim) ** -0.5, abs=0.03)
    assert found == pytest.approx(cosine, abs=0.03)
    assert abs(never) < 0.06


def test_the_delta_rule_reads_back_more():
    found, never = stored_and_read_back("delta", 256, 100, project=False)
    assert found > 0.87
    assert abs(never) < 0.06


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
def test_through_the_projected_query_fewer_pairs_fit(rule):
    # the projection adds the crosstalk of the keys among themselves to that of the memory
    for pairs, least, most in ((25, 0.84, 0.93), (100, 0.65, 0.75)):
        found, never = stored_and_read_back(rule, 256, pairs, project=True)
        assert least < found < most
        assert abs(never) < 0.06


@pytest.mark.parametrize(
    ("rule", "change", "message"),
    [
        ("delta", {"v": torch.zeros(1, 2, 4, 5)}, "received (1, 2, 3, 4), (1, 2, 3, 4) and (1, 2, 4, 5)"),
        ("delta", {"k": torch.zeros(1, 2, 3, 5)}, "q and k must be (batch, heads, length, key_dim)"),
        (
            "delta",
            {"beta": torch.zeros(1, 2)},
            "beta must be (batch, heads, length) = (1, 2, 3), received (1, 2)",
        ),
        ("delta", {"log_decay": torch.zeros(1, 2, 3)}, "rule 'delta' received one"),
        ("gated_delta", {}, "log_decay is what rule 'gated_delta' needs"),
    ],
)
def test_wrong_calls_are_named(rule, change, message):
    right = {"q": torch.zeros(1, 2, 3, 4), "k": torch.zeros(1, 2, 3, 4), "v": torch.zeros(1, 2, 3, 5)}
    with pytest.raises(ValueError, match=re.escape(message)):
        AssociativeMemory(rule)(**(right | change))


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="rule must be one of hebbian, delta, gated_delta, received 'oja'"):
        AssociativeMemory("oja")
    with pytest.raises(ValueError, match="kernel must be one of auto, tensor, fla, received 'cuda'"):
        AssociativeMemory(kernel="cuda")
