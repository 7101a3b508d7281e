"""The operators as formulas: values against a loop over keys, identities, and half precision."""

import itertools

import pytest
import torch

from theria.attention import scaled_dot_product_attention
from theria.attention.custom import CustomOperators
from theria.attention.operators import Band, Gradients

SHAPES = [
    ((5, 4), (7, 4), (7, 3), {}),
    ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {"is_causal": True}),
    ((2, 4, 6, 3), (2, 2, 4, 3), (2, 2, 4, 5), {"is_causal": True, "enable_gqa": True}),
    (
        (1, 4, 3, 2),
        (1, 1, 8, 2),
        (1, 1, 8, 2),
        {"window": 3, "causal_alignment": "lower_right", "enable_gqa": True},
    ),
    ((2, 6, 3), (2, 2, 3), (2, 2, 1), {"is_causal": True, "causal_alignment": "lower_right", "scale": 0.3}),
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), {"window": 1}),
]


@pytest.mark.parametrize(("query", "key", "value", "options"), SHAPES)
def test_values_are_those_of_a_loop_over_keys(naive_attention, query, key, value, options):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, dtype=torch.float64, generator=generator) for s in (query, key, value)]
    found = scaled_dot_product_attention(*inputs, backend="custom", **options)
    torch.testing.assert_close(found, naive_attention(*inputs, **options), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    inputs = [torch.randn(2, 2, 9, 8).to(dtype) for _ in range(3)]
    found = scaled_dot_product_attention(*inputs, backend="custom", is_causal=True)
    exact = scaled_dot_product_attention(*(x.double() for x in inputs), backend="reference", is_causal=True)
    assert found.dtype is dtype
    half_a_step = torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= half_a_step * exact.abs() * 1.01 + 1e-6).all()


@pytest.fixture(params=[Band(0.5), Band(0.5, causal=True), Band(0.5, causal=True, offset=-2, window=2)])
def operands(request):
    band, operators = request.param, CustomOperators()
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inputs = draw(2, 4, 5, 3), draw(2, 2, 6, 3), draw(2, 2, 6, 4)
    cotangents = Gradients(*(draw(*x.shape) for x in inputs))
    out, lse = operators.forward(*inputs, band)
    return operators, band, inputs, out, lse, draw(*out.shape), cotangents


def test_curvature_is_the_hessian_of_the_gradients_inner_product(operands):
    operators, band, inputs, out, lse, cotangent, directions = operands
    found = operators.hvp(*inputs, out, lse, cotangent, directions, band)

    def inner_product(q, k, v):
        return (operators.forward(q, k, v, band)[0] * cotangent).sum()

    _, expected = torch.autograd.functional.hvp(inner_product, inputs, tuple(directions))
    for a, b in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_cotangents_part_of_the_curvature_is_the_jvp(operands):
    operators, band, inputs, out, lse, cotangent, directions = operands
    curvature = operators.hvp(*inputs, out, lse, cotangent, directions, band)
    torch.testing.assert_close(
        curvature.out_cotangent, operators.jvp(*inputs, out, lse, directions, band), rtol=1e-13, atol=1e-14
    )


def test_curvature_is_the_gradient_of_the_jvps_inner_product(operands):
    operators, band, inputs, out, lse, cotangent, directions = operands
    found = operators.hvp(*inputs, out, lse, cotangent, directions, band)

    def inner_product(q, k, v):
        out, lse = operators.forward(q, k, v, band)
        return (operators.jvp(q, k, v, out, lse, directions, band) * cotangent).sum()

    expected = torch.autograd.functional.jacobian(inner_product, inputs)
    for a, b in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_second_jvp_is_the_jvps_derivative_and_symmetric(operands):
    operators, band, inputs, out, lse, cotangent, directions = operands
    others = Gradients(*(torch.cos(3 * x) for x in inputs))
    found = operators.second_jvp(*inputs, out, lse, directions, others, band)

    def moved(q, k, v):
        return operators.jvp(q, k, v, *operators.forward(q, k, v, band), directions, band)

    _, expected = torch.func.jvp(moved, inputs, tuple(others))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    exchanged = operators.second_jvp(*inputs, out, lse, others, directions, band)
    torch.testing.assert_close(found, exchanged, rtol=1e-13, atol=1e-14)
    # the Hessian of <dO, O> between the two, by its product with one of them
    curvature = operators.hvp(*inputs, out, lse, cotangent, directions, band)[:3]
    product = sum((g * t).sum() for g, t in zip(curvature, others, strict=True))
    torch.testing.assert_close((found * cotangent).sum(), product, rtol=1e-12, atol=1e-12)


def test_rows_without_a_key_are_zero_in_every_operator(operands):
    operators, _, inputs, _, _, cotangent, directions = operands
    band = Band(0.5, causal=True, offset=-3)
    out, lse = operators.forward(*inputs, band)
    gradients = operators.vjp(*inputs, out, lse, cotangent, band)
    curvature = operators.hvp(*inputs, out, lse, cotangent, directions, band)
    twice = operators.second_jvp(*inputs, out, lse, directions, directions, band)
    assert torch.isposinf(lse[:, :, :3]).all()
    assert torch.isfinite(lse[:, :, 3:]).all()
    for rows in (out, gradients.query, curvature.query, curvature.out_cotangent, twice):
        assert (rows[:, :, :3] == 0).all()
    assert all(torch.isfinite(t).all() for t in itertools.chain(gradients, curvature, [twice]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 3.0, 10.0])
def test_derivatives_in_half_precision_do_not_feel_the_size_of_keys_and_values(dtype, offset):
    """Both orders and both jvps within three times the error of the explicit softmax in float32."""
    torch.manual_seed(0)
    inputs = [(torch.randn(1, 2, 48, 16) + shift).to(dtype) for shift in (0.0, offset, offset)]
    directions = [torch.randn(1, 2, 48, 16).to(dtype) for _ in range(4)]

    def derivatives(backend, working):
        leaves = [x.to(working).requires_grad_() for x in inputs]
        a, b, c, cotangent = (d.to(working) for d in directions)
        out = scaled_dot_product_attention(*leaves, backend=backend)
        first = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
        second = torch.autograd.grad(first, leaves, (a, b, c))
        _, moved = torch.func.jvp(
            lambda *x: scaled_dot_product_attention(*x, backend=backend),
            tuple(x.to(working) for x in inputs),
            (a, b, c),
        )
        _, twice = torch.func.jvp(
            lambda *x: torch.func.jvp(
                lambda *y: scaled_dot_product_attention(*y, backend=backend), x, (a, b, c)
            )[1],
            tuple(x.to(working) for x in inputs),
            (b, c, a),
        )
        return [t.detach().double() for t in (*first, *second, moved, twice)]

    exact = derivatives("reference", torch.float64)
    explicit, found = derivatives("reference", dtype), derivatives("custom", dtype)
    for a, b, c in zip(found, explicit, exact, strict=True):
        assert (a - c).norm() <= 3 * (b - c).norm()


@pytest.mark.parametrize(("queries", "keys", "heads"), [(0, 5, 2), (5, 0, 2), (3, 4, 0)])
@pytest.mark.parametrize("options", [{}, {"window": 2}])
def test_empty_sizes_give_empty_or_zero(queries, keys, heads, options):
    query = torch.randn(2, heads, queries, 4, requires_grad=True)
    key, value = torch.randn(2, heads, keys, 4), torch.randn(2, heads, keys, 3)
    out = scaled_dot_product_attention(query, key, value, backend="custom", **options)
    assert out.shape == (2, heads, queries, 3)
    assert (out == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert (gradient == 0).all()
