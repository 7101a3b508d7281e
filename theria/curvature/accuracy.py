"""How far an implementation's derivatives are from float64, and how much of its curvature is there."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from theria.attention.call import CausalAlignment
from theria.curvature.cases import Sample
from theria.curvature.derivatives import HVP, HVP_CONSTANT, Quantity, evaluate
from theria.curvature.verdicts import TOLERANCES
from theria.curvature.yardsticks import exact, rounded

_FACTORS = (2.0, 3.0, 3.0)
"""Times the error of a sound rounding that an output and its derivatives may have, by order."""

_SMALL_PART = 0.01
_CLEARLY = 10.0


class Deviation(NamedTuple):
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
    sizes = {quantity: right.abs().max().item() for quantity, right in expected.items()}
    of_order = [max((sizes[q] for q in expected if q.order == order), default=0.0) for order in range(3)]
    deviations: dict[Quantity, Deviation] = {}
    shares: dict[Quantity, float] = {}
    for quantity, value in found.items():
        right, largest = expected[quantity], of_order[quantity.order]
        scale = max(sizes[quantity], _SMALL_PART * largest)
        if dtype in TOLERANCES:
            allowed = TOLERANCES[dtype] * scale
        else:
            rounding = max((other[quantity] - right).abs().max().item() for other in yardsticks)
            allowed = max(_FACTORS[quantity.order] * rounding, torch.finfo(dtype).eps * largest)
        error = (value - right).abs().max().item()
        # an error that is not a number is beyond every bound
        error = error if math.isfinite(error) else math.inf
        deviations[quantity] = Deviation(error / scale, error / allowed) if error > 0 else Deviation(0.0, 0.0)
        # of one input alone there is one block of its curvature, which is not what it keeps of the whole
        if quantity.way in (HVP, HVP_CONSTANT) and sizes[quantity] > _CLEARLY * allowed:
            shares[quantity] = share(value, right)
    return deviations, shares


def share(found: Tensor, expected: Tensor) -> float:
    """<x, y> / |y|^2: 1 if x is y, 0 if nothing of y is in it."""
    return ((found * expected).sum() / expected.square().sum()).item()
