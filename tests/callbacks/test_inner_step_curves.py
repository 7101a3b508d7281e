"""The figure of the inner loop shows the numbers that it is given."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from callbacks import InnerStepCurves
from callbacks.inner_step_curves import draw_inner_steps


def test_each_curve_and_its_band_are_drawn() -> None:
    mean = torch.tensor([0.2, 0.5, 0.9, 1.6, 1.2, 0.4, 1.5, 0.7, 0.1])
    half = torch.linspace(0.01, 0.09, 9)
    accuracy, losses = draw_inner_steps(mean, half).axes
    shown = [line.get_ydata() for axes in (accuracy, losses) for line in axes.lines]
    np.testing.assert_allclose(np.concatenate(shown), mean.numpy(), rtol=1e-6)
    bands = [band.get_paths()[0].vertices[:, 1] for axes in (accuracy, losses) for band in axes.collections]
    for band, value, spread in zip(bands, mean.chunk(3), half.chunk(3), strict=True):
        assert band.max() == pytest.approx(float((value + spread).max()))
        assert band.min() == pytest.approx(float((value - spread).min()))
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["query set", "support set"]


def test_one_task_has_no_band_and_is_drawn_all_the_same() -> None:
    accuracy, _ = draw_inner_steps(torch.ones(6), torch.full((6,), torch.nan)).axes
    assert len(accuracy.lines) == 1


def test_another_module_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="leave the callback out"):
        InnerStepCurves().on_fit_start(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"sanity_checking": True}, {"is_global_zero": False}])
def test_nothing_is_drawn_then(changes: dict[str, bool]) -> None:
    trainer: Any = SimpleNamespace(**({"sanity_checking": False, "is_global_zero": True} | changes))
    InnerStepCurves().on_validation_end(trainer, SimpleNamespace(val_interval=object()))  # type: ignore[arg-type]
