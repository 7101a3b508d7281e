"""How far an implementation's derivatives are from float64, and how much of its curvature is there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from theria.attention.call import CausalAlignment
from theria.curvature.cases import Sample
from theria.curvature.derivatives import (
    FORWARD,
    HVP,
    HVP_CONSTANT,
    KIND_OF,
    ORDER_OF,
    Quantity,
    evaluate,
)
from theria.curvature.verdicts import TOLERANCES
from theria.curvature.yardsticks import exact, rounded

_OUTPUT_FACTOR, _DERIVATIVE_FACTOR = 2.0, 3.0
_SMALL_PART = 0.01
_CLEARLY = 10.0


@dataclass(frozen=True)
class Deviation:
    """Error of one quantity: relative to its largest value, and as a multiple of what is allowed."""

    relative: float
    of_allowed: float


def compare(
    found: Mapping[Quantity, Tensor],
    sample: Sample,
    *,
    causal: bool,
    alignment: CausalAlignment,
    dtype: torch.dtype,
) -> tuple[dict[Quantity, Deviation], dict[Quantity, float]]:
    r"""Errors of an implementation's quantities, and the shares of its curvature that are there.

    The reference is the explicit softmax in float64 on the same numbers. An error is the largest over the
    elements, relative to the largest element of the reference, or to 1% of the largest of its order where
    that is more. Allowed is the dtype's tolerance for float32 and float64. For half precision it is
    flash-attention's rule, twice (outputs) or three times (derivatives) the error of sound computations
    rounded to that dtype (see `rounded`), or one unit of rounding of the largest of its order. A share is
    <H u, H_ref u> / |H_ref u|^2 in one input, with u along one; it is given where the reference is ten times
    above what an error may be.

    Args:
        found: quantities of the implementation.
        sample: what they were computed from.
        causal, alignment: the mask.
        dtype: whose rounding is allowed.

    Returns:
        quantity -> its deviation, and Hessian-vector product -> share.
    """
    expected = evaluate(exact(alignment), sample.double(), causal=causal).values
    ways = () if dtype in TOLERANCES else rounded(alignment)
    yardsticks = [evaluate(way, sample, causal=causal).values for way in ways]
    largest: dict[int, float] = {}
    for quantity, value in expected.items():
        order = _order(quantity)
        largest[order] = max(largest.get(order, 0.0), _largest(value))

    deviations: dict[Quantity, Deviation] = {}
    shares: dict[Quantity, float] = {}
    for quantity, value in found.items():
        right, of_order = expected[quantity], largest[_order(quantity)]
        scale = max(_largest(right), _SMALL_PART * of_order)
        if dtype in TOLERANCES:
            allowed = TOLERANCES[dtype] * scale
        else:
            factor = _OUTPUT_FACTOR if quantity.way == FORWARD else _DERIVATIVE_FACTOR
            rounding = max(_largest(other[quantity] - right) for other in yardsticks)
            allowed = max(factor * rounding, torch.finfo(dtype).eps * of_order)
        error = _largest(value - right)
        deviations[quantity] = Deviation(_ratio(error, scale), _ratio(error, allowed))
        # of one input alone there is one block of its curvature, which is not what it keeps of the whole
        if quantity.way in (HVP, HVP_CONSTANT) and _largest(right) > _CLEARLY * allowed:
            shares[quantity] = share(value, right)
    return deviations, shares


def share(found: Tensor, expected: Tensor) -> float:
    """<x, y> / |y|^2: 1 if x is y, 0 if nothing of y is in it."""
    return ((found * expected).sum() / expected.square().sum()).item()


def _order(quantity: Quantity) -> int:
    return ORDER_OF[KIND_OF[quantity.way]]


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _ratio(error: float, scale: float) -> float:
    """error / scale; 0 for no error at all, infinite where the error is not finite."""
    if error == 0:
        return 0.0
    return error / scale if math.isfinite(error) and scale > 0 else math.inf
