"""Means over tasks with their confidence intervals, as a torchmetrics metric."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from theria.t_interval import t_half_width


class Interval(NamedTuple):
    """Means of several outputs and the half-widths of their 95% confidence intervals."""

    mean: Tensor
    ci95: Tensor


class MeanOverTasks(Metric):
    r"""Mean over tasks and half-width of its 95% interval, for several outputs at once.

    .. math::
        \bar x \pm t_{0.975,\,n-1} \sqrt{\tfrac{1}{n(n-1)} \sum_i (x_i - \bar x)^2}

    Tasks are independent draws, so the interval speaks of new tasks of the same distribution under the
    same initial parameters. With one task the half-width is NaN.

    Args:
        outputs: number of values measured on every task.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, outputs: int) -> None:
        super().__init__()
        zeros = torch.zeros(outputs, dtype=torch.float64)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("squares", zeros.clone(), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add the tasks of one batch; values (outputs, tasks)."""
        values = values.double()
        self.count += values.shape[1]
        self.total += values.sum(1)
        self.squares += values.square().sum(1)

    def compute(self) -> Interval:
        """Means and half-widths, (outputs,) each."""
        n = self.count.item()
        mean = self.total / n
        if n < 2:
            return Interval(mean, torch.full_like(mean, torch.nan))
        variance = ((self.squares - n * mean.square()) / (n - 1)).clamp(min=0)
        return Interval(mean, t_half_width(variance.sqrt(), int(n)))
