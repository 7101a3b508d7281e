import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import grad as func_grad
from torch.func import jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from theria.attention import scaled_dot_product_attention

attend = functools.partial(scaled_dot_product_attention, backend="reference")


def tensors(query, key, value, dtype=torch.float64, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (query, key, value))
    return tuple(x.to(dtype).requires_grad_(requires_grad) for x in drawn)


def shapes(batch=(), heads=1, sharing=1, queries=3, keys=4, dim=2, value_dim=3):
    return (
        (*batch, heads * sharing, queries, dim),
        (*batch, heads, keys, dim),
        (*batch, heads, keys, value_dim),
    )


LOWER_RIGHT = {"causal_alignment": "lower_right"}
CASES = {
    "plain": (shapes(), {}),
    "no head dimension": (((3, 2), (4, 2), (4, 5)), {}),
    "no head dimension, causal": (((3, 2), (4, 2), (4, 5)), {"is_causal": True}),
    "leading dimensions": (shapes(batch=(2, 1, 2), heads=2), {"scale": 0.3}),
    "causal, fewer queries": (shapes(queries=3, keys=5), {"is_causal": True}),
    "causal, fewer queries, lower right": (shapes(queries=3, keys=5), {"is_causal": True, **LOWER_RIGHT}),
    "causal, fewer keys": (shapes(queries=5, keys=3), {"is_causal": True}),
    "causal, fewer keys, lower right": (shapes(queries=5, keys=3), {"is_causal": True, **LOWER_RIGHT}),
    "alignment without a mask": (shapes(queries=5, keys=3), LOWER_RIGHT),
    "window": (shapes(queries=6, keys=6), {"window": 3}),
    "window of one": (shapes(queries=4, keys=4), {"window": 1, "is_causal": True}),
    "window past the keys": (shapes(queries=7, keys=3), {"window": 2}),
    "window, lower right": (shapes(queries=3, keys=6), {"window": 2, **LOWER_RIGHT}),
    "window, fewer keys, lower right": (shapes(queries=6, keys=3), {"window": 2, **LOWER_RIGHT}),
    "grouped": (shapes(batch=(2,), heads=2, sharing=3), {"enable_gqa": True}),
    "grouped, without batch": (shapes(heads=2, sharing=2), {"enable_gqa": True}),
    "grouped, one query head each": (shapes(heads=3), {"enable_gqa": True}),
    "grouped, window": (shapes(heads=2, sharing=2, queries=5, keys=4), {"enable_gqa": True, "window": 2}),
    "no keys": (shapes(batch=(2,), keys=0), {}),
    "no keys, causal": (shapes(batch=(2,), keys=0), {"is_causal": True}),
    "no queries": (shapes(batch=(2,), queries=0), {"window": 2}),
    "no batch": (shapes(batch=(0,)), {}),
}
# Small enough for finite differences of second derivatives.
SMOOTH = {
    "plain": (shapes(queries=2, keys=3), {"scale": 0.9}),
    "grouped, window": (shapes(sharing=2, queries=3, keys=3), {"enable_gqa": True, "window": 2}),
    "dead rows above": (shapes(queries=3, keys=2), {"is_causal": True, **LOWER_RIGHT}),
    "dead rows below": (shapes(queries=4, keys=2), {"window": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case, naive_attention):
    sizes, options = CASES[case]
    inputs = tensors(*sizes)
    torch.testing.assert_close(attend(*inputs, **options), naive_attention(*inputs, **options))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_the_loop_at_any_shape(data, naive_attention):
    size = st.integers(1, 4)
    sizes = shapes(
        batch=tuple(data.draw(st.lists(st.integers(1, 2), max_size=2))),
        **{name: data.draw(size) for name in ("heads", "sharing", "queries", "keys", "dim", "value_dim")},
    )
    options = {
        "is_causal": data.draw(st.booleans()),
        "window": data.draw(st.none() | size),
        "causal_alignment": data.draw(st.sampled_from(["upper_left", "lower_right"])),
        "scale": data.draw(st.none() | st.floats(-2, 2)),
        "enable_gqa": True,
    }
    inputs = tensors(*sizes)
    torch.testing.assert_close(attend(*inputs, **options), naive_attention(*inputs, **options))


def test_any_strides():
    query, key, value = tensors((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 7))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    wide = torch.randn(2, 2, 6, 14, dtype=torch.float64)
    wide[..., ::2] = value
    out = attend(*strided, wide[..., ::2], enable_gqa=True, window=2)
    torch.testing.assert_close(out, attend(query, key, value, enable_gqa=True, window=2))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]
)
def test_dtypes_round_once(dtype, tolerance):
    sizes = shapes(batch=(2,), heads=2, sharing=2, queries=20, keys=50, dim=16, value_dim=8)
    inputs = tensors(*sizes, dtype=dtype)
    out = attend(*inputs, window=30, enable_gqa=True)
    exact = attend(*(x.double() for x in inputs), window=30, enable_gqa=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=1e-6)
    if dtype != torch.float32:
        assert torch.equal(out, attend(*(x.float() for x in inputs), window=30, enable_gqa=True).to(dtype))


def test_gradients_keep_half_dtypes():
    inputs = tensors(*shapes(), dtype=torch.bfloat16, requires_grad=True)
    assert {g.dtype for g in grad(attend(*inputs).sum(), inputs)} == {torch.bfloat16}


class OperationCounter(TorchDispatchMode):
    VIEWS = ("view", "_unsafe_view", "transpose", "expand", "unsqueeze", "detach")

    def __init__(self):
        super().__init__()
        self.names = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("vectorised", [False, True])
def test_without_a_mask_there_is_no_operation_to_spare(vectorised):
    inputs = tensors((3, 2, 1, 4), (3, 2, 5, 4), (3, 2, 5, 6), requires_grad=True)
    with OperationCounter() as counter:
        (vmap(attend) if vectorised else attend)(*inputs)
    assert counter.names == ["mul", "bmm", "_softmax", "bmm"]


def test_grouped_keys_are_not_repeated():
    query, key, value = tensors((8, 1, 32), (1, 16, 32), (1, 16, 32))
    with OperationCounter() as counter:
        attend(query, key, value, enable_gqa=True)
    assert counter.largest <= key.numel()


@pytest.mark.parametrize("case", SMOOTH)
def test_first_derivatives_against_finite_differences(case):
    sizes, options = SMOOTH[case]
    inputs = tensors(*sizes, requires_grad=True)
    assert gradcheck(lambda *x: attend(*x, **options), inputs, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("case", SMOOTH)
def test_second_derivatives_against_finite_differences(case):
    sizes, options = SMOOTH[case]
    inputs = tensors(*sizes, requires_grad=True)
    assert gradgradcheck(lambda *x: attend(*x, **options), inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", SMOOTH)
def test_third_derivatives_against_finite_differences(case):
    (query, key, value), options = SMOOTH[case]
    inputs = tensors(query, key, value, requires_grad=True)
    cotangent = torch.randn(attend(*inputs, **options).shape, dtype=torch.float64, requires_grad=True)

    def vjp(cotangent, *inputs):
        return grad(attend(*inputs, **options), inputs, cotangent, create_graph=True)

    assert gradgradcheck(vjp, (cotangent, *inputs), fast_mode=True)


def loss_of(options):
    """A scalar of (query, key, value) that is curved in the output as well."""

    def loss(query, key, value):
        return attend(query, key, value, **options).sin().square().sum()

    return loss


def nested_gradients(loss, inputs, directions, order):
    """The gradients of loss differentiated along the directions, up to the order, by double backward."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    scalar, found = loss(*inputs), []
    for direction in directions[:order]:
        gradients = grad(scalar, inputs, create_graph=True)
        found.append(gradients)
        scalar = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    return [[g.detach() for g in gradients] for gradients in found]


@pytest.mark.parametrize("case", SMOOTH)
def test_functional_transforms_agree_with_repeated_backward(case):
    sizes, options = SMOOTH[case]
    inputs, loss = tensors(*sizes), loss_of(options)
    directions = [tensors(*sizes, seed=seed) for seed in (1, 2, 3)]
    first, second, third = nested_gradients(loss, inputs, directions, order=3)

    gradient = func_grad(loss, argnums=(0, 1, 2))

    def along(function, direction):
        return lambda *x: jvp(function, x, direction)[1]

    compositions = {
        "grad": (gradient, first),
        "jvp(grad)": (along(gradient, directions[0]), second),
        "grad(jvp)": (func_grad(along(loss, directions[0]), argnums=(0, 1, 2)), second),
        "jvp(jvp(grad))": (along(along(gradient, directions[0]), directions[1]), third),
        "jvp(grad(jvp))": (
            along(func_grad(along(loss, directions[0]), argnums=(0, 1, 2)), directions[1]),
            third,
        ),
        "grad(jvp(jvp))": (
            func_grad(along(along(loss, directions[0]), directions[1]), argnums=(0, 1, 2)),
            third,
        ),
    }
    for name, (function, expected) in compositions.items():
        for found, wanted in zip(function(*inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mapped", list(itertools.product([0, 1, None], repeat=3))[:-1])
def test_vmap_over_any_dimension_of_any_input(mapped):
    sizes, options = SMOOTH["grouped, window"]
    drawn = [tensors(*sizes, seed=seed) for seed in range(3)]
    stacked = [
        drawn[0][i] if dim is None else torch.stack([each[i] for each in drawn], dim)
        for i, dim in enumerate(mapped)
    ]
    curvature = _curvature(options)
    found = vmap(curvature, in_dims=mapped)(*stacked)
    for task in range(3):
        inputs = [x if dim is None else x.select(dim, task) for x, dim in zip(stacked, mapped, strict=True)]
        for got, wanted in zip(found, curvature(*inputs), strict=True):
            torch.testing.assert_close(got[task], wanted)


def _curvature(options):
    """The output, and the gradient of loss with its change along the inputs themselves."""
    gradient = func_grad(loss_of(options), argnums=(0, 1, 2))

    def curvature(*inputs):
        change = jvp(gradient, inputs, tuple(x.clone() for x in inputs))
        return (attend(*inputs, **options), *change[0], *change[1])

    return curvature


# The live rows of a call with dead rows are a call of their own, without a dead row.
DEAD_ROWS = {
    "lower right": (7, 3, {"is_causal": True, **LOWER_RIGHT}, slice(4, None)),
    "lower right, window": (7, 3, {"window": 2, **LOWER_RIGHT}, slice(4, None)),
    "window past the keys": (7, 3, {"window": 2}, slice(None, 4)),
}


@pytest.mark.parametrize("case", DEAD_ROWS)
def test_dead_rows_are_zero_and_leave_no_trace_through_third_order(case):
    queries, keys, options, live = DEAD_ROWS[case]
    sizes = shapes(batch=(2,), queries=queries, keys=keys)
    query, key, value = tensors(*sizes)
    dead = torch.ones(queries, dtype=torch.bool)
    dead[live] = False
    out = attend(query, key, value, **options)
    assert torch.equal(out[..., dead, :], torch.zeros_like(out[..., dead, :]))

    directions = [tensors(*sizes, seed=seed) for seed in (1, 2, 3)]
    found = nested_gradients(loss_of(options), (query, key, value), directions, order=3)
    living = [(a[..., live, :], b, c) for a, b, c in directions]
    expected = nested_gradients(loss_of(options), (query[..., live, :], key, value), living, order=3)
    for order in range(3):
        assert torch.equal(found[order][0][..., dead, :], torch.zeros_like(query[..., dead, :]))
        torch.testing.assert_close(found[order][0][..., live, :], expected[order][0])
        torch.testing.assert_close(found[order][1:], expected[order][1:])


@pytest.mark.parametrize("case", DEAD_ROWS)
def test_dead_rows_pass_anomaly_detection(case):
    queries, keys, options, _ = DEAD_ROWS[case]
    sizes = shapes(queries=queries, keys=keys)
    directions = [tensors(*sizes, seed=seed) for seed in (1, 2, 3)]
    with torch.autograd.set_detect_anomaly(True):
        nested_gradients(loss_of(options), tensors(*sizes), directions, order=3)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 1, **LOWER_RIGHT}])
def test_without_keys_every_derivative_is_zero(options):
    sizes = shapes(keys=0)
    directions = [tensors(*sizes, seed=seed) for seed in (1, 2)]
    for gradients in nested_gradients(loss_of(options), tensors(*sizes), directions, order=2):
        assert torch.equal(gradients[0], torch.zeros(sizes[0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_scores_stay_finite(dtype):
    query, key, value = tensors(*shapes(queries=4, keys=4), dtype=dtype)
    out, *derivatives = _curvature({"is_causal": True})(query * 100, key * 100, value)
    assert all(x.isfinite().all() for x in (out, *derivatives))


def test_invisible_keys_do_not_leak():
    query, key, value = tensors(*shapes(queries=4, keys=4))
    changed = key.clone()
    changed[..., 2:, :] = 1e300
    options = {"is_causal": True}
    assert torch.equal(
        attend(query, key, value, **options)[..., :2, :], attend(query, changed, value, **options)[..., :2, :]
    )
