"""Every way of taking a derivative, against finite differences and plain autograd in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from theria.attention import scaled_dot_product_attention
from theria.curvature.cases import Case, Sample, default_cases, draw
from theria.curvature.derivatives import (
    FORWARD,
    FORWARD_OVER_REVERSE,
    HVP,
    HVP_ALONE,
    HVP_CONSTANT,
    INPUTS,
    JVP,
    OUTPUTS,
    VJP,
    VJP_ALONE,
    VJP_CONSTANT,
    VJP_GRAPH,
    Quantity,
    differentiate_again,
    evaluate,
)
from theria.curvature.verdicts import Status

REFERENCE = partial(scaled_dot_product_attention, backend="reference")
CASE = Case(2, 1, 3, 4, 5, causal=True, strided=True)


@pytest.fixture
def sample() -> Sample:
    return draw(CASE, layout="heads_first", device="cpu", dtype=torch.float64, seed=3)


def gradient(inputs: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(REFERENCE(*leaves, is_causal=True), leaves, cotangent)


def moved(sample: Sample, step: float, along: str | None) -> tuple[Tensor, ...]:
    """Inputs a step further, in one of them or in all."""
    return tuple(
        x + step * u if along in (None, name) else x
        for name, x, u in zip(INPUTS, sample.inputs, sample.directions, strict=True)
    )


def test_first_derivatives_equal_finite_differences(sample):
    values = evaluate(REFERENCE, sample, causal=True).values
    step = 1e-5
    for name, direction in zip(INPUTS, sample.directions, strict=True):
        ahead, behind = (REFERENCE(*moved(sample, s, name), is_causal=True) for s in (step, -step))
        numeric = (ahead - behind) / (2 * step)
        torch.testing.assert_close(values[Quantity(JVP, name)], numeric, rtol=1e-8, atol=1e-8)
        along = (numeric * sample.cotangent).sum()
        for way in (VJP, VJP_GRAPH, VJP_CONSTANT, VJP_ALONE):
            torch.testing.assert_close((values[Quantity(way, name)] * direction).sum(), along)
    torch.testing.assert_close(values[Quantity(FORWARD, "out")], REFERENCE(*sample.inputs, is_causal=True))


def test_second_derivatives_equal_finite_differences(sample):
    values = evaluate(REFERENCE, sample, causal=True).values
    step = 1e-5

    def numeric(along: str | None) -> tuple[Tensor, ...]:
        ahead, behind = (gradient(moved(sample, s, along), sample.cotangent) for s in (step, -step))
        return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))

    for along in INPUTS:
        for name, expected in zip(INPUTS, numeric(along), strict=True):
            for way in (HVP, HVP_CONSTANT):
                found = values[Quantity(way, name, along)]
                torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
            if along == name:
                found = values[Quantity(HVP_ALONE, name, name)]
                torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        # the derivative of <gradient, direction> by the cotangent is the jvp
        found = values[Quantity(HVP, "cotangent", along)]
        torch.testing.assert_close(found, values[Quantity(JVP, along)])
    for name, expected in zip(INPUTS, numeric(None), strict=True):
        found = values[Quantity(FORWARD_OVER_REVERSE, name)]
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_nothing_is_left_out(sample):
    values = evaluate(REFERENCE, sample, causal=True).values
    counts = {
        FORWARD: 1,
        VJP: 3,
        VJP_GRAPH: 3,
        VJP_CONSTANT: 3,
        VJP_ALONE: 3,
        HVP: 12,
        HVP_CONSTANT: 9,
        HVP_ALONE: 3,
    }
    counts |= {JVP: 3, FORWARD_OVER_REVERSE: 3}
    assert {way: sum(q.way == way for q in values) for way in counts} == counts


class Once(Function):
    """x cubed, whose backward says that it is not differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


def test_a_refusal_to_differentiate_twice_is_heard():
    """The reason for asking for every leaf: asked for x alone, autograd passes the refusal by."""
    x = torch.tensor(2.0, requires_grad=True)
    (slope,) = torch.autograd.grad(x * Once.apply(x), x, create_graph=True)
    (silent,) = torch.autograd.grad(slope, x, retain_graph=True)
    assert silent == 3 * 2**2 + 0 * silent != 12 * 2**2  # 12 x^2 is right
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        differentiate_again(slope, [x])


def test_second_derivatives_touch_no_grad_of_other_leaves():
    weight = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor(2.0, requires_grad=True)
    (slope,) = torch.autograd.grad(weight * x**3, x, create_graph=True)
    (curvature,) = differentiate_again(slope, [x])
    assert curvature == 6 * 3 * 2
    assert weight.grad is None
    assert x.grad is None


def test_a_gradient_without_graph_is_zero_curvature_and_no_error():
    x = torch.ones(3, requires_grad=True)
    (curvature,) = differentiate_again(torch.tensor(5.0), [x])
    assert torch.equal(curvature, torch.zeros(3))


def test_each_failure_says_its_order_and_what_it_means(sample):
    def raises(query, key, value, *, is_causal=False):
        raise RuntimeError("no such kernel\nsecond line")

    def cut(query, key, value, *, is_causal=False):
        return REFERENCE(query.detach(), key, value, is_causal=is_causal)

    def once(query, key, value, *, is_causal=False):
        return Once.apply(REFERENCE(query, key, value, is_causal=is_causal))

    found = {f.__name__: evaluate(f, sample, causal=True).failure for f in (raises, cut, once)}
    assert (found["raises"].order, found["raises"].status) == (0, Status.HARD_FAIL_OTHER)
    assert found["raises"].error == "RuntimeError: no such kernel"
    assert (found["cut"].order, found["cut"].status) == (1, Status.HARD_FAIL_UNUSED)
    assert (found["once"].order, found["once"].status) == (2, Status.HARD_FAIL_ONCE_DIFF)


def test_a_forward_mode_that_is_missing_is_an_absence(sample):
    class NoForwardMode(Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, cotangent):
            return cotangent

    def attend(query, key, value, *, is_causal=False):
        return NoForwardMode.apply(REFERENCE(query, key, value, is_causal=is_causal))

    outcome = evaluate(attend, sample, causal=True)
    assert outcome.failure is None
    assert set(outcome.unsupported) == {JVP, FORWARD_OVER_REVERSE}
    assert "jvp" in outcome.unsupported[JVP]
    assert not any(quantity.way in outcome.unsupported for quantity in outcome.values)


def test_a_tangent_that_is_lost_is_zero(sample):
    def detached(query, key, value, *, is_causal=False):
        out = REFERENCE(query, key, value, is_causal=is_causal)
        return out if out.requires_grad else out.detach()

    values = evaluate(detached, sample, causal=True).values
    for name in INPUTS:
        assert torch.equal(values[Quantity(JVP, name)], torch.zeros_like(sample.cotangent))


def test_a_call_that_breaks_the_rules_has_no_output(sample):
    def truncates(query, key, value, *, is_causal=False):
        return REFERENCE(query, key, value, is_causal=is_causal)[..., :-1, :]

    def writes(query, key, value, *, is_causal=False):
        out = REFERENCE(query, key, value, is_causal=is_causal)
        key.data.zero_()
        return out

    for function, complaint in ((truncates, "shape"), (writes, "writes into its input key")):
        outcome = evaluate(function, sample, causal=True)
        assert complaint in outcome.failure.error
        assert outcome.values[Quantity(FORWARD, "out")].isnan().all()
    assert sample.key.abs().sum() > 0


@pytest.mark.parametrize("layout", ["heads_first", "heads_last"])
@pytest.mark.parametrize("strided", [False, True])
def test_inputs_are_contiguous_in_the_layout_unless_the_case_says_otherwise(layout, strided):
    case = Case(2, 3, 4, 5, 8, magnitude=3.0, strided=strided)
    sample = draw(case, layout=layout, device="cpu", dtype=torch.float32, seed=0)
    for tensor in (*sample.inputs, sample.cotangent):
        heads_last = tensor.transpose(1, 2).is_contiguous()
        assert heads_last != tensor.is_contiguous()
        assert heads_last == ((layout == "heads_last") != strided)
    same = draw(Case(2, 3, 4, 5, 8, magnitude=3.0), layout=layout, device="cpu", dtype=torch.float32, seed=0)
    assert torch.equal(sample.query, same.query)
    assert sample.query.std().item() == pytest.approx(3, rel=0.2)
    assert sample.value.std().item() == pytest.approx(1, rel=0.2)


def test_a_uniform_cotangent_is_one_number_in_memory():
    case = Case(1, 1, 4, 4, 8, uniform_cotangent=True)
    sample = draw(case, layout="heads_first", device="cpu", dtype=torch.float32, seed=0)
    assert sample.cotangent.stride() == (0, 0, 0, 0)
    assert torch.equal(sample.cotangent, torch.ones(1, 1, 4, 8))


def test_default_cases_cover_what_has_gone_wrong_before():
    cases = default_cases("cpu")
    assert {case.causal for case in cases} == {True, False}
    assert any(case.queries == 1 for case in cases)
    assert any(case.queries < case.keys and case.causal for case in cases)
    assert any(case.queries > case.keys for case in cases)
    assert any(case.strided for case in cases)
    assert any(case.uniform_cotangent for case in cases)
    assert {case.magnitude for case in cases} == {0.1, 1, 3}
    assert max(case.keys for case in cases) > 128
    assert set(cases) < set(default_cases("cuda"))
    assert set(OUTPUTS) == {*INPUTS, "cotangent"}
