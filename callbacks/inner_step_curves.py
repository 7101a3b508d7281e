"""How well tasks are solved after every inner step, as a figure at every validation."""

from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

_LINES = {"query set": "-", "support set": "--"}


class InnerStepCurves(Callback):
    """Draws ``val/inner_steps``: accuracy and losses by inner step, with their 95% intervals over tasks.

    The figure is drawn after each validation, for TensorBoard, on rank zero, from the intervals in the
    module's ``val_interval``, as MetaSeqClassifier has them.

    Raises:
        MisconfigurationException: at the start of a fit, if the module has no such attribute.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there will be something to draw."""
        if not hasattr(pl_module, "val_interval"):
            raise MisconfigurationException(
                f"{type(self).__name__} draws the `val_interval` of MetaSeqClassifier;"
                f" {type(pl_module).__name__} has none: leave the callback out"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the validation found."""
        interval: Any = pl_module.val_interval
        if trainer.sanity_checking or interval is None or not trainer.is_global_zero:
            return
        step = max(trainer.global_step - 1, 0)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                figure = draw_inner_steps(interval.mean, interval.ci95)
                logger.experiment.add_figure("val/inner_steps", figure, step)


def draw_inner_steps(mean: Tensor, ci95: Tensor) -> Figure:
    """Query accuracy (left), and query and support loss (right), by inner step.

    Args:
        mean: (3 (K + 1),), query accuracy, query loss and support loss after 0 to K inner steps.
        ci95: half-widths of their intervals; NaN where there was one task.
    """
    figure = Figure(figsize=(7.2, 3.0), dpi=80, layout="constrained")
    accuracy, losses = figure.subplots(1, 2)
    means, halves = (np.split(values.double().cpu().numpy(), 3) for values in (mean, ci95))
    steps = np.arange(len(means[0]))
    panels = [(accuracy, "query set"), (losses, "query set"), (losses, "support set")]
    for (axes, name), value, half in zip(panels, means, halves, strict=True):
        (line,) = axes.plot(steps, value, _LINES[name], marker="o", markersize=3, label=name)
        axes.fill_between(steps, value - half, value + half, color=line.get_color(), alpha=0.25, linewidth=0)
    for axes, title in ((accuracy, "query accuracy"), (losses, "loss")):
        axes.set_xlabel("inner step")
        axes.set_title(title, fontsize="medium")
        axes.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(fontsize="small")
    return figure
