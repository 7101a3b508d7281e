"""The projection against a loop over tokens, in float64, and what it promises about shards and scale."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.memory import PersistentMemory, ProjectionState, QKProjection, causal_projection
from theria.memory.hebbian import CHUNKS_AT_ONCE

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ("q", "k", "m_persistent", "norm_persistent")


def arguments(a):
    return a.q, a.k, a.m_persistent, a.norm_persistent


def assert_state(state, expected):
    memory, norm = expected
    torch.testing.assert_close(state.memory, memory, **CLOSE)
    torch.testing.assert_close(state.norm_sum, norm, **CLOSE)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 37, 64])
def test_equals_a_loop_over_tokens(naive_projection, draw, chunk_size, packed):
    a = draw()
    ids = a.segment_ids if packed else None
    found, state = causal_projection(*arguments(a), segment_ids=ids, chunk_size=chunk_size)
    expected, last = naive_projection(*arguments(a), segment_ids=ids)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert_state(state, last)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 90),
    chunk_size=st.integers(1, 70),
    boundaries=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    cut=st.integers(0, 90),
    seed=st.integers(0, 2**16),
)
def test_lengths_chunks_boundaries_and_cuts(
    naive_projection, draw, length, chunk_size, boundaries, cut, seed
):
    a = draw(batch=2, heads=1, length=length, dim=3, boundaries=boundaries, seed=seed)
    expected, last = naive_projection(*arguments(a), segment_ids=a.segment_ids)
    cut = min(cut, length)
    parts, state = [], None
    for part in (slice(0, cut), slice(cut, length)):
        read, state = causal_projection(
            a.q[:, :, part],
            a.k[:, :, part],
            a.m_persistent,
            a.norm_persistent,
            segment_ids=a.segment_ids[:, part],
            chunk_size=chunk_size,
            state=state,
        )
        parts.append(read)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, **CLOSE)
    assert_state(state, last)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_gradients_equal_the_loop_s(naive_projection, draw, packed):
    a = draw(length=21, boundaries=0.2)
    start = ProjectionState(torch.randn(2, 2, 5, 5).double(), torch.rand(2, 2).double())
    cotangents = [torch.randn(2, 2, 21, 5), torch.randn(2, 2, 5, 5), torch.randn(2, 2)]

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (*arguments(a), start.memory, start.norm_sum)]
        out, rest = function(
            *leaves[:4],
            segment_ids=a.segment_ids - 7 if packed else None,
            state=ProjectionState(*leaves[4:]),
        )
        total = sum((t * c).sum() for t, c in zip((out, *rest[:2]), cotangents, strict=True))
        return torch.autograd.grad(total, leaves, materialize_grads=True)

    found = gradients(lambda *args, **kwargs: causal_projection(*args, chunk_size=4, **kwargs))
    for ours, loop in zip(found, gradients(naive_projection), strict=True):
        torch.testing.assert_close(ours, loop, **CLOSE)


def test_more_chunks_than_are_summed_at_once(naive_projection, draw):
    length = 2 * (2 * CHUNKS_AT_ONCE + 3) + 1
    a = draw(length=length, boundaries=0.05)
    for ids in (None, a.segment_ids):
        found, state = causal_projection(*arguments(a), segment_ids=ids, chunk_size=2)
        expected, last = naive_projection(*arguments(a), segment_ids=ids)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert_state(state, last)


@pytest.mark.parametrize("chunk_size", [1, 8, 16, 64])
def test_float32_stays_within_rounding_of_float64(naive_projection, draw, chunk_size):
    a = draw(batch=1, length=300, dim=16, boundaries=0.01)
    expected, (memory, norm) = naive_projection(*arguments(a), segment_ids=a.segment_ids)
    found, state = causal_projection(
        *(t.float() for t in arguments(a)), segment_ids=a.segment_ids, chunk_size=chunk_size
    )
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert (state.memory - memory).norm() < 1e-6 * memory.norm()
    torch.testing.assert_close(state.norm_sum.double(), norm, rtol=1e-6, atol=0)


def test_token_by_token_is_one_call(draw):
    a = draw(length=23)
    for ids in (None, a.segment_ids):
        expected, last = causal_projection(*arguments(a), segment_ids=ids)
        state, parts = None, []
        for t in range(23):
            here = slice(t, t + 1)
            read, state = causal_projection(
                a.q[:, :, here],
                a.k[:, :, here],
                a.m_persistent,
                a.norm_persistent,
                segment_ids=None if ids is None else ids[:, here],
                state=state,
            )
            parts.append(read)
        torch.testing.assert_close(torch.cat(parts, dim=2), expected, **CLOSE)
        assert_state(state, last[:2])
        assert state.memory.shape == (2, 2, 5, 5)


def test_without_ids_a_call_goes_on_in_the_state_s_shard(draw):
    a = draw(length=20, boundaries=0.1)
    half = slice(0, 10), slice(10, 20)
    first = causal_projection(
        a.q[:, :, half[0]], a.k[:, :, half[0]], *arguments(a)[2:], segment_ids=a.segment_ids[:, half[0]]
    )[1]
    rest = a.q[:, :, half[1]], a.k[:, :, half[1]], a.m_persistent, a.norm_persistent
    without, state = causal_projection(*rest, state=first)
    repeated = a.segment_ids[:, 9:10].expand(-1, 10)
    given, _ = causal_projection(*rest, state=first, segment_ids=repeated)
    torch.testing.assert_close(without, given, **CLOSE)
    assert torch.equal(state.segment, a.segment_ids[:, 9])


def test_a_batch_s_sequences_and_heads_never_mix(draw):
    a = draw(batch=3)
    whole, state = causal_projection(*arguments(a), segment_ids=a.segment_ids)
    for b in range(3):
        for h in range(2):
            alone, own = causal_projection(
                a.q[b : b + 1, h : h + 1],
                a.k[b : b + 1, h : h + 1],
                a.m_persistent[h : h + 1],
                a.norm_persistent[h : h + 1],
                segment_ids=a.segment_ids[b : b + 1],
            )
            torch.testing.assert_close(alone[0, 0], whole[b, h], **CLOSE)
            torch.testing.assert_close(own.memory[0, 0], state.memory[b, h], **CLOSE)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
@pytest.mark.parametrize("boundary", [1, 7, 8, 20])
def test_no_gradient_crosses_a_shard_boundary_and_all_cross_within(draw, boundary, chunk_size):
    length = 21
    a = draw(batch=1, heads=1, length=length, dtype=torch.float32)
    ids = (torch.arange(length) >= boundary).long()[None]
    for inside in (True, False):
        k = a.k.clone().requires_grad_()
        out, state = causal_projection(
            a.q, k, a.m_persistent, a.norm_persistent, chunk_size=chunk_size, segment_ids=ids
        )
        late = out[:, :, :boundary] if inside else out[:, :, boundary:]
        total = late.square().sum()
        if not inside:
            total = total + state.memory.square().sum() + state.norm_sum.sum()
        (gradient,) = torch.autograd.grad(total, k)
        before = gradient[:, :, :boundary]
        if inside:
            assert (before.abs().sum(-1) > 0).all()
        else:
            assert torch.count_nonzero(before) == 0
            assert (gradient[:, :, boundary:].abs().sum(-1) > 0).all()


def test_a_shard_begins_with_both_persistent_parts(draw):
    a = draw(batch=1, length=9)
    ids = torch.tensor([[0, 0, 0, 0, 4, 4, 5, 5, 5]])
    packed, state = causal_projection(*arguments(a), segment_ids=ids)
    for shard in (slice(0, 4), slice(4, 6), slice(6, 9)):
        alone, own = causal_projection(a.q[:, :, shard], a.k[:, :, shard], *arguments(a)[2:])
        torch.testing.assert_close(packed[:, :, shard], alone, **CLOSE)
    assert_state(state, own[:2])


def test_right_after_a_reset_norm_sum_is_norm_persistent():
    torch.manual_seed(0)
    module = QKProjection(PersistentMemory(3, 8))
    state = module.reset_at_shard_boundary(2)
    assert torch.equal(state.norm_sum, module.persistent.norm_persistent.expand(2, 3))
    assert torch.equal(state.memory, module.persistent.m_persistent.expand(2, 3, 8, 8))
    # a token that stores nothing leaves them as they are, also behind other shards
    k = torch.randn(2, 3, 5, 8)
    k[:, :, 3:] = 0
    _, after = module(torch.randn(2, 3, 5, 8), k, segment_ids=torch.tensor([[0, 0, 1, 2, 2]] * 2))
    assert torch.equal(after.norm_sum, state.norm_sum)
    assert torch.equal(after.memory, state.memory)


def test_states_are_float32_under_bfloat16_autocast_and_for_bfloat16_inputs(draw):
    a = draw(dtype=torch.float32)
    expected, plain = causal_projection(*arguments(a), segment_ids=a.segment_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, state = causal_projection(*arguments(a), segment_ids=a.segment_ids)
    assert cast.dtype == state.memory.dtype == state.norm_sum.dtype == torch.float32
    assert torch.equal(cast, expected)
    assert torch.equal(state.memory, plain.memory)
    low, state = causal_projection(
        a.q.bfloat16(), a.k.bfloat16(), *arguments(a)[2:], segment_ids=a.segment_ids
    )
    assert low.dtype == torch.bfloat16
    assert state.memory.dtype == state.norm_sum.dtype == torch.float32
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.02)


def test_second_derivatives_against_finite_differences(draw):
    a = draw(batch=1, heads=1, length=5, dim=2)
    ids = torch.tensor([[0, 0, 0, 1, 1]])

    def project(*leaves):
        out, state = causal_projection(*leaves, segment_ids=ids, chunk_size=2)
        return out, state.memory, state.norm_sum

    leaves = tuple(t.clone().requires_grad_() for t in arguments(a))
    assert torch.autograd.gradcheck(project, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(project, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_vmap_over_a_further_dimension(draw):
    a, b = draw(seed=1), draw(seed=2)
    stacked = [torch.stack(pair) for pair in zip(arguments(a), arguments(b), strict=True)]
    found = torch.func.vmap(lambda *args: causal_projection(*args, chunk_size=8)[0])(*stacked)
    for each, one in zip(found, (a, b), strict=True):
        torch.testing.assert_close(each, causal_projection(*arguments(one), chunk_size=8)[0], **CLOSE)


def test_nothing_is_read_back_from_the_device():
    # A tensor on the meta device has no values: looking at one raises.
    q, k = torch.zeros(2, 2, 3, 50, 4, device="meta")
    ids = torch.zeros(2, 50, dtype=torch.int64, device="meta")
    m, n = torch.zeros(2, 4, 4, device="meta"), torch.zeros(2, device="meta")
    out, state = causal_projection(q, k, m[:1].expand(3, 4, 4), n[:1].expand(3), segment_ids=ids)
    out, _ = causal_projection(q, k, m[:1].expand(3, 4, 4), n[:1].expand(3), segment_ids=ids, state=state)
    assert out.shape == q.shape


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("dim", [64, 256])
def test_the_projected_query_keeps_a_useful_scale_at_any_length(dim):
    torch.manual_seed(0)
    module = QKProjection(PersistentMemory(1, dim)).requires_grad_(False)
    q = unit(1, 1, 64, dim, seed=0)
    state, seen = None, 0
    for tokens in (1, 500, 20_000):
        _, state = module(*[unit(1, 1, tokens - seen, dim, seed=tokens)] * 2, state=state)
        seen = tokens
        # many queries at this length: keys of zero add neither to M nor to norm_sum
        ratio = module(q, torch.zeros_like(q), state=state)[0].norm(dim=-1)
        # at width 64 one query in many comes so close to the only key that it passes the bound by itself
        most = ratio.max() if dim == 256 or tokens > 1 else ratio.square().mean().sqrt()
        assert ratio.min() > 0.5, (tokens, ratio.min())
        assert most < (dim + 1) ** 0.5, (tokens, most)


def test_norm_persistent_still_counts():
    torch.manual_seed(0)
    module = QKProjection(PersistentMemory(1, 64))
    q, k = unit(1, 1, 500, 64, seed=1), unit(1, 1, 500, 64, seed=2)
    m, n = module.persistent.m_persistent, module.persistent.norm_persistent.detach().requires_grad_()
    found, _ = causal_projection(q, k, m, n)
    without, _ = causal_projection(q, k, m, torch.zeros(1))
    # the first token has stored 1, beside which norm_persistent is 64 x 64 x 0.02^2 = 1.6
    assert found[0, 0, 0].norm() < 0.5 * without[0, 0, 0].norm()
    assert found[0, 0, -1].norm() > 0.99 * without[0, 0, -1].norm()
    for t in (0, 499):
        (slope,) = torch.autograd.grad(found[0, 0, t].norm(), n, retain_graph=True)
        # d log |q'| / d norm_persistent is -1 / norm_sum
        torch.testing.assert_close(slope / found[0, 0, t].norm(), -1 / (n.detach() + t + 1))


def test_nothing_seen_at_all_is_zero_and_little_is_not_rounded_away():
    q = unit(1, 1, 3, 4, seed=1)
    nothing, _ = causal_projection(q, torch.zeros_like(q), torch.zeros(1, 4, 4), torch.zeros(1))
    assert torch.equal(nothing, torch.zeros_like(q))
    k = 1e-3 * unit(1, 1, 3, 4, seed=2)
    little, _ = causal_projection(q, k, torch.zeros(1, 4, 4), torch.zeros(1))
    much, _ = causal_projection(q, 1e3 * k, torch.zeros(1, 4, 4), torch.zeros(1))
    torch.testing.assert_close(little, much)


def test_the_module_scales_and_learns_persistent_vectors_and_scale(draw):
    a = draw(dtype=torch.float32, dim=8)
    torch.manual_seed(0)
    module = QKProjection(PersistentMemory(2, 8), chunk_size=4)
    torch.testing.assert_close(module.scale, torch.full((2,), 8.0))
    found, _ = module(a.q, a.k, segment_ids=a.segment_ids)
    m, n = module.persistent.m_persistent, module.persistent.norm_persistent
    plain, _ = causal_projection(a.q, a.k, m, n, segment_ids=a.segment_ids)
    torch.testing.assert_close(found, 8 * plain)
    found.square().sum().backward()
    for parameter in module.parameters():
        assert (parameter.grad.abs().flatten(1 if parameter.ndim > 1 else 0) > 0).any(-1).all()
    assert set(dict(module.named_parameters())) == {"relative_scale", "persistent.vectors"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 3)}, "q and k must be of one dtype and one shape"),
        (
            {"k": torch.zeros(1, 2, 3, 5)},
            "received torch.float32 (1, 2, 3, 4) and torch.float32 (1, 2, 3, 5)",
        ),
        ({"k": torch.zeros(1, 2, 3, 4).double()}, "torch.float64 (1, 2, 3, 4)"),
        ({"m_persistent": torch.zeros(2, 4, 3)}, "m_persistent must be (heads, dim, dim) = (2, 4, 4)"),
        ({"norm_persistent": torch.zeros(3)}, "norm_persistent (heads,) = (2,)"),
        ({"segment_ids": torch.zeros(1, 4).long()}, "segment_ids must be int64 of shape"),
        ({"segment_ids": torch.zeros(1, 3)}, "received torch.float32 of (1, 3)"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer, received 0"),
        ({"kernel": "cuda"}, "kernel must be one of auto, tensor, fla, received 'cuda'"),
    ],
)
def test_wrong_calls_are_named(change, message):
    right = {
        "q": torch.zeros(1, 2, 3, 4),
        "k": torch.zeros(1, 2, 3, 4),
        "m_persistent": torch.zeros(2, 4, 4),
        "norm_persistent": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        causal_projection(**(right | change))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_no_host_synchronisation_on_a_gpu(draw, packed):
    a = draw(dtype=torch.float32, length=300, dim=32)
    device = [t.cuda() for t in arguments(a)]
    ids = a.segment_ids.cuda() if packed else None
    k = device[1].requires_grad_()
    causal_projection(*device, segment_ids=ids)  # the libraries' own first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, state = causal_projection(*device, segment_ids=ids)
        out, _ = causal_projection(*device, segment_ids=ids, state=state)
        torch.autograd.grad(out.sum(), k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, first = causal_projection(*arguments(a), segment_ids=a.segment_ids if packed else None)
    expected, _ = causal_projection(*arguments(a), segment_ids=a.segment_ids if packed else None, state=first)
    assert (out.detach().cpu() - expected).norm() < 1e-5 * expected.norm()
