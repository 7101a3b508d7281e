"""The taxonomy: how an implementation can fail second-order learning, from the loudest to the subtlest."""

import re
from collections.abc import Sequence
from enum import StrEnum

import torch

SURVIVING = 0.1
"""Below this share of the reference's curvature, an input's second-order signal counts as gone."""

PRESENT = 0.01
"""From this part of the reference's magnitude on, a second-order path counts as existing."""

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Largest error of a derivative relative to float64, for the dtypes in which one number can say it."""


class Status(StrEnum):
    """Whether differentiation ran.

    OK                   first and second order ran.
    HARD_FAIL_UNUSED     an input is not in the graph of the output.
    HARD_FAIL_ONCE_DIFF  first order runs, and the second derivative is refused as not existing.
    HARD_FAIL_OTHER      any other error, the forward's own refusal included.
    """

    OK = "OK"
    HARD_FAIL_UNUSED = "HARD_FAIL_UNUSED"
    HARD_FAIL_ONCE_DIFF = "HARD_FAIL_ONCE_DIFF"
    HARD_FAIL_OTHER = "HARD_FAIL_OTHER"


class Verdict(StrEnum):
    """The first of these that applies.

    HARD_FAIL         no first-order gradient.
    FIRST_ORDER_ONLY  second order raises.
    SILENT_COLLAPSE   runs, and some input keeps less than 10% of its curvature.
    WRONG_FORWARD     the output is off by more than the dtype's tolerance.
    WRONG_GRADIENT    a first derivative is, in reverse or forward mode.
    WRONG_CURVATURE   a second derivative is.
    SAFE              none of these.
    """

    HARD_FAIL = "HARD_FAIL"
    FIRST_ORDER_ONLY = "FIRST_ORDER_ONLY"
    SILENT_COLLAPSE = "SILENT_COLLAPSE"
    WRONG_FORWARD = "WRONG_FORWARD"
    WRONG_GRADIENT = "WRONG_GRADIENT"
    WRONG_CURVATURE = "WRONG_CURVATURE"
    SAFE = "SAFE"

    def reaches(self, threshold: "Verdict") -> bool:
        """Whether this is ``threshold`` or stands before it in the order of the taxonomy."""
        order: Sequence[Verdict] = tuple(Verdict)
        return order.index(self) <= order.index(threshold)


_CUT = re.compile(r"not have been used in the graph|does not require grad and does not have a grad_fn")
_ONCE = re.compile(
    r"once_differentiable|differentiate twice|double.?backward|derivative for \S+ is not implemented"
)


def status_of(error: Exception, order: int) -> Status:
    """What a failed derivative of this order (0 for the forward itself) says about the implementation."""
    text = str(error)
    if order > 0 and _CUT.search(text):
        return Status.HARD_FAIL_UNUSED
    if order > 1 and _ONCE.search(text):
        return Status.HARD_FAIL_ONCE_DIFF
    return Status.HARD_FAIL_OTHER


def one_line(error: Exception) -> str:
    """An error's type and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
