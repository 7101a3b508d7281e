"""Window attention against an explicit mask: shards, windows, caches and rotary positions."""

import itertools
import math

import pytest
import torch

from theria.models.window_attention import WindowAttention, rotate, rotation_of

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def case(window, *, heads=2, width=12, length=17, boundaries=0.25, dtype=torch.float64, backend="auto"):
    torch.manual_seed(0)
    attention = WindowAttention(width, heads, window=window, backend=backend).to(dtype)
    ids = 3 * (torch.rand(2, length) < boundaries).long().cumsum(dim=1) + 4
    return attention, torch.randn(2, length, width, dtype=dtype), ids


def rotation(length, head_dim, first=0, dtype=torch.float64):
    return rotation_of(first, length, head_dim, dtype=dtype)


def explicit(attention, x, ids):
    """Every pair of tokens, one mask; positions by rotating pairs of features one by one."""
    length, half = x.shape[1], attention.head_dim // 2
    q, k, v = (
        proj(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )

    def turned(heads):
        out = heads.clone()
        for t in range(length):
            for i in range(half):
                angle = t * 10_000 ** (-2 * i / attention.head_dim)
                a, b = heads[:, :, t, i], heads[:, :, t, i + half]
                out[:, :, t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[:, :, t, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    scores = turned(q) @ turned(k).mT / attention.head_dim**0.5
    token = torch.arange(length)
    seen = (token <= token[:, None]) & (token > token[:, None] - attention.window)
    seen = seen & (ids[:, :, None] == ids[:, None, :])
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [2, 3, 4, 5, 9, 40])
@pytest.mark.parametrize("boundaries", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("backend", ["reference", "custom"])
def test_equals_an_explicit_mask(window, boundaries, backend):
    attention, x, ids = case(window, boundaries=boundaries, backend=backend)
    found, _ = attention(x, rotation(17, 6), segment_ids=ids)
    torch.testing.assert_close(found, explicit(attention, x, ids), **CLOSE)
    if not boundaries:
        torch.testing.assert_close(attention(x, rotation(17, 6))[0], found, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [2, 5, 8, 9])
def test_features_add_nothing_within_a_shard_and_a_gulf_across(window, dtype):
    attention, _, ids = case(window, boundaries=0.5)
    q, k = torch.zeros(2, 2, 2, 17, 6, dtype=dtype)
    q, k = attention._apart(q, k, ids)
    assert q.dtype == k.dtype == dtype
    scores = (q.double() @ k.double().mT) / 6**0.5
    same = ids[:, None, :, None] == ids[:, None, None, :]
    near = (torch.arange(17)[:, None] - torch.arange(17)).abs() < window
    assert (scores[same.expand_as(scores)] == 0).all()
    assert (scores[(~same & near).expand_as(scores)] <= -1024).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_are_kept_apart_in_every_precision(dtype):
    # large activations, so that a mask that only lowers scores a little would leak
    attention, x, _ = case(5, dtype=torch.float32)
    attention, x = attention.to(dtype), (10 * x).to(dtype)
    ids = (torch.arange(17) >= 8).long().expand(2, -1)
    turn = rotation(17, 6, dtype=torch.float32)
    other = x.clone()
    other[:, :8] = torch.randn_like(other[:, :8])
    found, changed = attention(x, turn, segment_ids=ids)[0], attention(other, turn, segment_ids=ids)[0]
    # not equal to the bit: a matrix product's rounding may depend on where its operands lie in memory
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(found[:, 8:], changed[:, 8:], **rounding)
    torch.testing.assert_close(attention(x[:, :8], turn[:, :8])[0], found[:, :8], **rounding)


def test_no_gradient_crosses_a_shard_boundary():
    attention, x, _ = case(6, dtype=torch.float32)
    ids = (torch.arange(17) >= 8).long().expand(2, -1)
    x.requires_grad_()
    out, _ = attention(x, rotation(17, 6, dtype=torch.float32), segment_ids=ids)
    (gradient,) = torch.autograd.grad(out[:, 8:].square().sum(), x)
    assert torch.count_nonzero(gradient[:, :8]) == 0
    assert (gradient[:, 8:].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("cuts", [tuple(range(18)), (0, 5, 17), (0, 1, 16, 17)])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [2, 5, 40])
def test_calls_one_after_another_are_one_call(cuts, packed, window):
    attention, x, ids = case(window)
    expected, _ = attention(x, rotation(17, 6), segment_ids=ids if packed else None)
    state, parts = None, []
    for first, end in itertools.pairwise(cuts):
        here = slice(first, end)
        turn = rotation(end - first, 6, first)
        out, state = attention(x[:, here], turn, segment_ids=ids[:, here] if packed else None, state=state)
        parts.append(out)
        assert state.key.shape[2] == min(end, window - 1)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


def test_ids_given_late_or_no_longer():
    attention, x, ids = case(5)
    ids = ids - 4
    both = torch.cat((torch.zeros_like(ids[:, :6]), ids[:, 6:]), dim=1)
    expected, _ = attention(x, rotation(17, 6), segment_ids=both)
    _, state = attention(x[:, :6], rotation(6, 6))
    late, _ = attention(x[:, 6:], rotation(11, 6, 6), segment_ids=ids[:, 6:], state=state)
    torch.testing.assert_close(late, expected[:, 6:], **CLOSE)

    held = torch.cat((ids[:, :6], ids[:, 5:6].expand(-1, 11)), dim=1)
    expected, _ = attention(x, rotation(17, 6), segment_ids=held)
    _, state = attention(x[:, :6], rotation(6, 6), segment_ids=ids[:, :6])
    without, _ = attention(x[:, 6:], rotation(11, 6, 6), state=state)
    torch.testing.assert_close(without, expected[:, 6:], **CLOSE)


def test_scores_depend_on_distances_alone():
    attention, x, _ = case(5)
    near, _ = attention(x, rotation(17, 6))
    far, _ = attention(x, rotation(17, 6, 1000))
    torch.testing.assert_close(near, far, rtol=1e-9, atol=1e-9)


def test_far_positions_keep_their_angles():
    far = rotation_of(131_072, 1, 64)
    angle = 131_072 * 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(far[:, 0].double(), torch.stack((angle.cos(), angle.sin())), rtol=0, atol=1e-7)


def test_rotation_keeps_lengths_and_dtype():
    x = torch.randn(2, 3, 5, 8)
    turned = rotate(x, rotation_of(3, 5, 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), rotation_of(3, 5, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("width", "heads", "window", "message"),
    [
        (10, 2, 4, "width must be an even number a head, received width 10, heads 2"),
        (12, 0, 4, "received width 12, heads 0"),
        (12, 2, 1, "window must be at least 2, received 1"),
    ],
)
def test_wrong_sizes_are_named(width, heads, window, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(width, heads, window=window)


def test_unknown_backend_is_refused_at_construction():
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        WindowAttention(12, 2, window=4, backend="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_backend_keeps_shards_apart(dtype):
    attention, x, ids = case(9, heads=2, width=64, length=150, boundaries=0.05, dtype=torch.float32)
    expected, _ = attention(x, rotation(150, 32, dtype=torch.float32), segment_ids=ids)
    attention, x = attention.cuda().to(dtype), x.cuda().to(dtype)
    attention.backend = "triton_fused"
    turn = rotation(150, 32, dtype=torch.float32).cuda()
    found, _ = attention(x, turn, segment_ids=ids.cuda())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (found.float().cpu() - expected).norm() < tolerance * expected.norm()
