"""What an error is measured by, what is allowed, and how much of a curvature is there."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from theria.attention import scaled_dot_product_attention
from theria.curvature.accuracy import compare, share
from theria.curvature.cases import Case, draw
from theria.curvature.derivatives import FORWARD, HVP, INPUTS, JVP, VJP, Quantity, evaluate
from theria.curvature.yardsticks import rounded

REFERENCE = partial(scaled_dot_product_attention, backend="reference")
CASE = Case(1, 2, 7, 7, 16)
HALVES = [torch.bfloat16, torch.float16]


def exact_values(case: Case, dtype: torch.dtype) -> tuple[dict[Quantity, Tensor], object]:
    """The reference's quantities in float64, and the sample in the dtype that they belong to."""
    sample = draw(case, layout="heads_first", device="cpu", dtype=dtype, seed=1)
    return evaluate(REFERENCE, sample.double(), causal=case.causal).values, sample


def compared(values, sample, dtype, case=CASE):
    return compare(values, sample, causal=case.causal, alignment="upper_left", dtype=dtype)


def test_the_exact_values_deviate_by_nothing_and_keep_everything():
    values, sample = exact_values(CASE, torch.float32)
    deviations, shares = compared(values, sample, torch.float32)
    assert set(deviations) == set(values)
    assert {d.relative for d in deviations.values()} == {0.0}
    assert {d.of_allowed for d in deviations.values()} == {0.0}
    assert set(shares.values()) == {1.0}
    # every block but the second derivative by value and value, which is zero; and the cotangent's three
    assert len(shares) == 8 + 3 + 8


@pytest.mark.parametrize("quantity", [Quantity(FORWARD, "out"), Quantity(VJP, "key"), Quantity(JVP, "value")])
def test_an_error_is_the_largest_element_over_the_largest_of_the_reference(quantity):
    values, sample = exact_values(CASE, torch.float32)
    error = torch.zeros_like(values[quantity])
    error[0, 1, 2, 3] = -0.02 * values[quantity].abs().max()
    values[quantity] = values[quantity] + error
    deviations, _ = compared(values, sample, torch.float32)
    assert deviations[quantity].relative == pytest.approx(0.02)
    assert deviations[quantity].of_allowed == pytest.approx(20)  # of 1e-3
    assert all(d.relative == 0 for q, d in deviations.items() if q != quantity)


def test_a_part_of_nothing_is_measured_by_its_order():
    """The second derivative by value and value is zero: rounding in it is not an infinite error."""
    values, sample = exact_values(CASE, torch.float32)
    quantity = Quantity(HVP, "value", "value")
    assert values[quantity].abs().max() < 1e-12
    largest = max(v.abs().max().item() for q, v in values.items() if q.kind == "hvp")
    values[quantity] = values[quantity] + 1e-4 * largest
    deviations, shares = compared(values, sample, torch.float32)
    assert deviations[quantity].relative == pytest.approx(1e-4 / 0.01)
    assert quantity not in shares


def test_a_number_that_is_not_finite_is_an_infinite_error():
    values, sample = exact_values(CASE, torch.float32)
    for bad in (math.nan, math.inf):
        values[Quantity(VJP, "query")] = values[Quantity(VJP, "query")] * bad
        deviations, _ = compared(values, sample, torch.float32)
        assert deviations[Quantity(VJP, "query")].of_allowed == math.inf


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_allowed_two_and_three_times_the_error_of_sound_roundings(dtype):
    values, sample = exact_values(CASE, dtype)
    rounded = evaluate(explicit_softmax, sample, causal=False).values
    deviations, _ = compared(rounded, sample, dtype)
    assert explicit_softmax(*sample.inputs).dtype == dtype
    for quantity, deviation in deviations.items():
        factor = 2 if quantity.way == FORWARD else 3
        # its own error is at most the yardstick, unless a unit of rounding is more than that
        assert deviation.of_allowed <= 1 / factor + 1e-9
    assert deviations[Quantity(FORWARD, "out")].of_allowed > 0.25
    # an error of ten units of rounding is beyond it
    values[Quantity(FORWARD, "out")] = values[Quantity(FORWARD, "out")] * (1 + 10 * torch.finfo(dtype).eps)
    deviations, _ = compared(values, sample, dtype)
    assert deviations[Quantity(FORWARD, "out")].of_allowed > 1


def explicit_softmax(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ value


def test_the_alignment_of_the_diagonal_is_the_callables():
    case = Case(1, 1, 3, 8, 16, causal=True)
    sample = draw(case, layout="heads_first", device="cpu", dtype=torch.float32, seed=1)
    lower = partial(REFERENCE, causal_alignment="lower_right")
    values = evaluate(lower, sample.double(), causal=True).values
    for alignment, sound in (("lower_right", True), ("upper_left", False)):
        deviations, _ = compare(values, sample, causal=True, alignment=alignment, dtype=torch.float32)
        assert (max(d.of_allowed for d in deviations.values()) <= 1) == sound


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_without_a_key_are_no_trouble(dtype):
    case = Case(1, 1, 8, 3, 16, causal=True)
    sample = draw(case, layout="heads_first", device="cpu", dtype=dtype, seed=1)
    lower = partial(REFERENCE, causal_alignment="lower_right")
    values = evaluate(lower, sample, causal=True).values
    deviations, _ = compare(values, sample, causal=True, alignment="lower_right", dtype=dtype)
    assert max(d.of_allowed for d in deviations.values()) <= 1


def test_a_share_is_what_lies_along_the_reference():
    exact = torch.tensor([3.0, 4.0])
    assert share(exact, exact) == 1
    assert share(torch.zeros(2), exact) == 0
    assert share(torch.tensor([4.0, -3.0]), exact) == 0
    assert share(0.3 * exact + torch.tensor([4.0, -3.0]), exact) == pytest.approx(0.3)
    assert share(-exact, exact) == -1


def test_no_share_is_given_of_what_is_not_well_above_rounding():
    values, sample = exact_values(CASE, torch.bfloat16)
    _, shares = compared(values, sample, torch.bfloat16)
    assert Quantity(HVP, "query", "key") in shares
    assert Quantity(HVP, "value", "value") not in shares
    flat = dataclasses.replace(CASE, magnitude=1e-3)
    values, sample = exact_values(flat, torch.bfloat16)
    _, shares = compared(values, sample, torch.bfloat16, flat)
    # of order 1e-6 beside curvature of order 1, and not zero
    assert values[Quantity(HVP, "query", "query")].abs().max() > 0
    assert Quantity(HVP, "query", "query") not in shares
    assert Quantity(HVP, "query", "key") in shares


def test_shares_are_given_for_every_way_that_takes_all_blocks():
    values, sample = exact_values(CASE, torch.float32)
    _, shares = compared(
        {q: v * (0.5 if q.of == "key" else 1) for q, v in values.items()}, sample, torch.float32
    )
    for quantity, kept in shares.items():
        assert kept == pytest.approx(0.5 if quantity.of == "key" else 1)
    assert {q.along for q in shares} == set(INPUTS)


def test_the_fused_yardstick_in_nested_forward_mode_is_off_by_its_rounding_alone():
    sample = draw(CASE, layout="heads_first", device="cpu", dtype=torch.float32, seed=1)
    inputs = sample.query, sample.key, sample.value
    tangents = [tuple(x.cos() for x in inputs), tuple((3 * x).sin() for x in inputs)]

    def twice(attention, dtype):
        x, first, second = (tuple(t.to(dtype) for t in group) for group in (inputs, *tangents))
        return jvp(lambda *y: jvp(partial(attention, is_causal=True), y, first)[1], x, second)[1].double()

    fused, exact = rounded("upper_left")[-1], twice(REFERENCE, torch.float64)
    assert (twice(fused, torch.float32) - exact).norm() <= 1e-6 * exact.norm()
    halves = [t.half().double() for t in (*inputs, *tangents[0], *tangents[1])]
    inputs, *tangents = (tuple(halves[i : i + 3]) for i in (0, 3, 6))
    exact = twice(REFERENCE, torch.float64)
    assert 1e-4 < (twice(fused, torch.float16) - exact).norm() / exact.norm() < 2e-3
