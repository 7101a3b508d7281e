"""The half-width of a mean's interval against scipy's interval."""

import math

import pytest
import torch
from scipy import stats

from theria.t_interval import t_half_width


@pytest.mark.parametrize("count", [2, 3, 30])
@pytest.mark.parametrize("confidence", [0.95, 0.999])
def test_it_is_scipys(count: int, confidence: float) -> None:
    draws = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = stats.t.interval(confidence, count - 1, draws.mean(0), stats.sem(draws))
    expected = torch.as_tensor(high - low) / 2
    torch.testing.assert_close(t_half_width(draws.std(0), count, confidence), expected)
    assert t_half_width(draws[:, 0].std().item(), count, confidence) == pytest.approx(expected[0].item())


@pytest.mark.parametrize("count", [0, 1])
def test_one_draw_has_none(count: int) -> None:
    assert math.isnan(t_half_width(1.0, count))
    assert t_half_width(torch.ones(2), count).isnan().all()
