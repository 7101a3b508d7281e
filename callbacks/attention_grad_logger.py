"""Norms and histograms of the gradients that reach the attention projections."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from callbacks.charts import Chart, Lines
from callbacks.intervals import checked_interval
from callbacks.loop_state import log_values, logging_step


class AttentionGradLogger(Callback):
    """Logs ``grad/<projection>``, the Euclidean norm of all gradients of a projection, every n steps.

    A projection is every trainable parameter whose name contains its name, over all layers together. The
    gradients are those that the optimiser is about to use (unscaled, averaged over ranks). With a TensorBoard
    logger their entries also appear as the histogram ``grad/<projection>_histogram``. On the steps in between
    nothing is computed and the device is not waited for.

    Values stand on the loggers' step axis where ``self.log`` puts those of the same batch. Under manual
    optimisation the step has to be taken through ``self.optimizers()``, as Lightning asks.

    Args:
        every_n_steps: optimiser steps between two reports.
        histograms: whether to write histograms as well.
        projections: parts of parameter names.

    Raises:
        TypeError, ValueError: ``every_n_steps`` is not a positive integer, ``projections`` is empty, or a
            projection matches no trainable parameter when a fit starts.
    """

    needs_whole_parameters = True

    def __init__(
        self,
        every_n_steps: int = 50,
        histograms: bool = True,
        projections: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    ) -> None:
        if isinstance(projections, str) or not projections or not all(projections):
            raise ValueError(f"projections must list parts of parameter names, got {projections!r}")
        self.every_n_steps = checked_interval(every_n_steps)
        self.histograms = histograms
        self.projections = tuple(projections)
        self._warned: set[str] = set()

    def charts(self, trainer: Trainer) -> list[Chart]:
        """The norms together."""
        tags = tuple(f"grad/{re.escape(projection)}" for projection in self.projections)
        return [Lines("Gradients and curvature", "Attention gradient norms", tags, self.every_n_steps)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that every projection exists, and that histograms have somewhere to go."""
        names = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        absent = [part for part in self.projections if not any(part in name for name in names)]
        if absent:
            raise ValueError(
                f"{type(self).__name__}: no trainable parameter of {type(pl_module).__name__} has {absent} "
                f"in its name; set projections to parts of {names}"
            )
        # fast_dev_run takes the place of every logger, so their kinds say nothing about the configuration.
        dry_run = trainer.fast_dev_run  # type: ignore[attr-defined]  # set outside of Trainer's class body
        if self.histograms and not dry_run and not _writers(trainer):
            self._warn_once(f"{type(self).__name__}: no TensorBoard logger, so histograms are off")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Report the gradients of the step that is about to be finished, every n steps."""
        step = logging_step(trainer)
        if (step + 1) % self.every_n_steps or not trainer.is_global_zero:
            return
        gradients = self._gradients(pl_module, optimizer)
        if not gradients:
            return
        norms = torch.stack([torch.linalg.vector_norm(values) for values in gradients.values()]).tolist()
        metrics = {f"grad/{projection}": norm for projection, norm in zip(gradients, norms, strict=True)}
        log_values(trainer, metrics, step)
        if self.histograms:
            for writer in _writers(trainer):
                self._write_histograms(writer, gradients, step)

    def _gradients(self, pl_module: LightningModule, optimizer: Optimizer) -> dict[str, Tensor]:
        """Every entry of a projection's gradients as one vector, for those that this optimiser trains."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found: dict[str, Tensor] = {}
        for projection in self.projections:
            parameters = [
                parameter
                for name, parameter in pl_module.named_parameters()
                if projection in name and id(parameter) in trained
            ]
            parts = [
                parameter.grad.detach().flatten() for parameter in parameters if parameter.grad is not None
            ]
            if parts:
                values = torch.cat(parts)
                found[projection] = values.to(torch.promote_types(values.dtype, torch.float32))
            elif parameters:
                self._warn_once(
                    f"{type(self).__name__}: no gradient reaches {projection}, grad/{projection} is left out"
                )
        return found

    def _write_histograms(self, writer: Any, gradients: dict[str, Tensor], step: int) -> None:
        for projection, values in gradients.items():
            finite = values[torch.isfinite(values)]
            if finite.numel() < values.numel():
                self._warn_once(
                    f"{type(self).__name__}: the gradient of {projection} is not finite everywhere; "
                    "its histograms leave those entries out"
                )
            if finite.numel():
                writer.add_histogram(f"grad/{projection}_histogram", finite.cpu(), step)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)


def _writers(trainer: Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
