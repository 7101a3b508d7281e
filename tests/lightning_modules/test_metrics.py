"""Interval over tasks against scipy, in one batch or several."""

import math

import pytest
import torch
from scipy import stats

from lightning_modules.metrics import MeanOverTasks


@pytest.mark.parametrize("cuts", [[40], [7, 13, 20], [1] * 40])
def test_mean_and_interval_are_students(cuts):
    values = torch.rand(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = MeanOverTasks(2)
    for part in values.split(cuts, dim=1):
        metric.update(part)
    interval = metric.compute()
    for row, mean, half in zip(values.numpy(), interval.mean, interval.ci95, strict=True):
        low, high = stats.t.interval(0.95, len(row) - 1, loc=row.mean(), scale=stats.sem(row))
        assert mean.item() == pytest.approx(row.mean(), rel=1e-12)
        assert half.item() == pytest.approx((high - low) / 2, rel=1e-9)


def test_one_task_has_no_interval_and_a_reset_forgets():
    metric = MeanOverTasks(1)
    metric.update(torch.tensor([[0.5]]))
    assert math.isnan(metric.compute().ci95.item())
    metric.reset()
    metric.update(torch.tensor([[0.0, 1.0]]))
    assert metric.compute().mean.item() == 0.5
