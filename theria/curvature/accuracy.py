"""How far an implementation's derivatives are from float64, and how much of its curvature is there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from theria.attention import scaled_dot_product_attention
from theria.attention.call import CausalAlignment, diagonal_offset
from theria.attention.masks import visible_keys
from theria.curvature.cases import Sample
from theria.curvature.derivatives import FORWARD, HVP, HVP_CONSTANT, KIND_OF, Quantity, evaluate
from theria.curvature.verdicts import TOLERANCES

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
    elements, relative to the largest element of the reference, or to 1% of the largest of its kind where that
    is more. Allowed is the dtype's tolerance for float32 and float64; for half precision, twice (outputs) or
    three times (derivatives) the error of the explicit softmax in that dtype, which is flash-attention's
    rule, or one unit of rounding of the largest of its kind. A share is <H u, H_ref u> / |H_ref u|^2 in one
    input, with u along one; it is given where the reference is ten times above what an error may be.

    Args:
        found: quantities of the implementation.
        sample: what they were computed from.
        causal, alignment: the mask.
        dtype: whose rounding is allowed.

    Returns:
        quantity -> its deviation, and Hessian-vector product -> share.
    """
    expected = evaluate(partial(_exact, alignment=alignment), sample.double(), causal=causal).values
    rounded = [
        evaluate(partial(_rounded, alignment=alignment, split=split), sample, causal=causal).values
        for split in (() if dtype in TOLERANCES else (False, True))
    ]
    largest: dict[str, float] = {}
    for quantity, value in expected.items():
        kind = KIND_OF[quantity.way]
        largest[kind] = max(largest.get(kind, 0.0), _largest(value))

    deviations: dict[Quantity, Deviation] = {}
    shares: dict[Quantity, float] = {}
    for quantity, value in found.items():
        kind, exact = KIND_OF[quantity.way], expected[quantity]
        scale = max(_largest(exact), _SMALL_PART * largest[kind])
        if dtype in TOLERANCES:
            allowed = TOLERANCES[dtype] * scale
        else:
            factor = _OUTPUT_FACTOR if quantity.way == FORWARD else _DERIVATIVE_FACTOR
            rounding = max(_largest(other[quantity] - exact) for other in rounded)
            allowed = max(factor * rounding, torch.finfo(dtype).eps * largest[kind])
        error = _largest(value - exact)
        deviations[quantity] = Deviation(_ratio(error, scale), _ratio(error, allowed))
        # of one input alone there is one block of its curvature, which is not what it keeps of the whole
        if quantity.way in (HVP, HVP_CONSTANT) and _largest(exact) > _CLEARLY * allowed:
            shares[quantity] = share(value, exact)
    return deviations, shares


def share(found: Tensor, expected: Tensor) -> float:
    """<x, y> / |y|^2: 1 if x is y, 0 if nothing of y is in it."""
    return ((found * expected).sum() / expected.square().sum()).item()


def _exact(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, alignment: CausalAlignment
) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, causal_alignment=alignment, backend="reference"
    )


def _rounded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    alignment: CausalAlignment,
    split: bool,
) -> Tensor:
    """The textbook formula, every operation rounded to the inputs' dtype.

    The scale is applied to the scores, or half of it to either factor: two ways to round the same thing, so
    that the yardstick does not hang on one happening to round well.
    """
    scale = query.shape[-1] ** -0.5
    factor = math.sqrt(scale)
    scores = (factor * query) @ (factor * key).mT if split else query @ key.mT * scale
    if is_causal:
        queries, keys = scores.shape[-2:]
        offset = diagonal_offset(queries, keys, alignment)
        visible = visible_keys(queries, keys, window=None, offset=offset, device=query.device)
        dead = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~(visible | dead), -math.inf)
        return scores.softmax(-1).masked_fill(dead, 0) @ value
    return scores.softmax(-1) @ value


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _ratio(error: float, scale: float) -> float:
    """error / scale; 0 for no error at all, infinite where the error is not finite."""
    if error == 0:
        return 0.0
    return error / scale if math.isfinite(error) and scale > 0 else math.inf
