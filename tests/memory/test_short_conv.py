"""The short convolution against sums over tokens, and its stop at shard boundaries."""

import itertools

import pytest
import torch

from theria.memory import ShortConvolution

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def naive(x, weight, ids):
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for back in range(len(weight)):
                if t >= back and ids[b, t] == ids[b, t - back]:
                    out[b, t] = out[b, t] + weight[back] * x[b, t - back]
    return out


def case(taps, length=13):
    torch.manual_seed(0)
    conv = ShortConvolution(3, taps=taps).double()
    torch.nn.init.normal_(conv.weight)
    ids = 2 * (torch.rand(2, length) < 0.25).long().cumsum(dim=1) + 5
    return conv, torch.randn(2, length, 3).double(), ids


@pytest.mark.parametrize("taps", [1, 2, 4, 20])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_equals_sums_over_tokens(taps, packed):
    conv, x, ids = case(taps)
    found, state = conv(x, segment_ids=ids if packed else None)
    expected = naive(x, conv.weight, ids if packed else torch.zeros_like(ids))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert state.inputs.shape == (2, taps - 1, 3)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("cuts", [(0, 13), (0, 1, 2, 3, 13), tuple(range(14)), (0, 6, 6, 13)])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_calls_one_after_another_are_one_call(taps, cuts, packed):
    conv, x, ids = case(taps)
    expected, last = conv(x, segment_ids=ids if packed else None)
    state, parts = None, []
    for first, end in itertools.pairwise(cuts):
        here = slice(first, end)
        out, state = conv(x[:, here], segment_ids=ids[:, here] if packed else None, state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    torch.testing.assert_close(state.inputs, last.inputs, **CLOSE)


def test_without_ids_a_call_goes_on_in_the_state_s_shard():
    conv, x, ids = case(4)
    _, state = conv(x[:, :7], segment_ids=ids[:, :7])
    without, _ = conv(x[:, 7:], state=state)
    given, _ = conv(x[:, 7:], state=state, segment_ids=ids[:, 6:7].expand(-1, 6))
    torch.testing.assert_close(without, given, **CLOSE)


def test_no_gradient_crosses_a_shard_boundary():
    conv, x, _ = case(4)
    ids = (torch.arange(13) >= 6).long().expand(2, -1)
    x.requires_grad_()
    out, state = conv(x, segment_ids=ids)
    (gradient,) = torch.autograd.grad(out[:, 6:].square().sum() + state.inputs.sum(), x)
    assert torch.count_nonzero(gradient[:, :6]) == 0
    assert (gradient[:, 6:].abs().sum(-1) > 0).all()


def test_it_starts_as_the_identity():
    conv = ShortConvolution(3, taps=4)
    x = torch.randn(2, 5, 3)
    assert torch.equal(conv(x)[0], x)


def test_the_dtype_of_the_input_is_kept():
    conv, x, ids = case(4)
    assert conv.float()(x.bfloat16(), segment_ids=ids)[0].dtype == torch.bfloat16
