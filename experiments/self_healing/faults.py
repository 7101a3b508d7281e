"""Faults that break a training, put in by a callback that stands before all others."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.packing import TextBatch

LOSS_FACTOR = 10.0
INPUT_FACTOR = 30.0
RATE_FACTOR = 100.0


@dataclasses.dataclass(frozen=True)
class Fault:
    """What breaks, and when.

    Attributes:
        title: in words.
        kind: scaled, nan_loss, nan_gradient, inf_gradient, corrupted or rate.
        steps: the optimiser steps it is put in at, from 1, each once: a replay of the step is sound.
        batches: numbers of training batches that are broken whenever they come.
        count: of faults that have to be found.
        is_counted: among the faults that have to be found and healed.
    """

    title: str
    kind: str
    steps: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    count: int = 1
    is_counted: bool = True


# Checkpoints of the faulty runs come every 200 steps, and are targets 50 good steps later.
FAULTS = {
    "spike": Fault("one scaled batch", "scaled", steps=(330,)),
    "burst": Fault(
        "eight of ten batches scaled, returning", "scaled", batches=(*range(340, 345), 346, 347, 349)
    ),
    "nan_loss": Fault("NaN in the loss", "nan_loss", steps=(352,)),
    "nan_gradient": Fault("NaN in one entry of a gradient", "nan_gradient", steps=(363,)),
    "inf_gradient": Fault("Inf in one entry of a gradient", "inf_gradient", steps=(374,)),
    "corrupted": Fault("two batches with wrong labels, returning", "corrupted", batches=(384, 385)),
    "rate": Fault("learning rate x 100 for 20 steps", "rate", steps=tuple(range(290, 310))),
    "on_checkpoint": Fault("a scaled batch at a checkpoint", "scaled", steps=(400,)),
    "around_checkpoint": Fault(
        "two scaled batches with a checkpoint between them", "scaled", steps=(380, 420), count=2
    ),
    "before_checkpoint": Fault("a scaled batch before the first checkpoint", "scaled", steps=(150,)),
    "for_ever": Fault(
        "every batch from step 330 on scaled",
        "scaled",
        batches=tuple(range(329, 5000)),
        count=3,
        is_counted=False,
    ),
}


class Injection(Callback):
    """Breaks the training of a module at the steps and batches of a fault.

    Args:
        fault: what and when.

    Attributes:
        hit: which of the steps taken were broken, counted from 1 in the order of training.
    """

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.hit: list[int] = []
        self._taken = 0
        self._left = set(fault.steps)
        self._loss_factor = 1.0
        self._hooks: list[Any] = []
        self._rates_raised_at: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand between an automatic module and its losses."""
        if not pl_module.automatic_optimization:
            return
        training_step: Callable[..., Any] = pl_module.training_step

        def spoiled(*args: Any) -> Any:
            losses = training_step(*args)
            return {name: loss * self._loss_factor for name, loss in losses.items()}

        pl_module.__dict__["training_step"] = spoiled

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Break this batch if it is its turn."""
        step = trainer.global_step + 1
        self._taken += 1
        if self.fault.kind == "rate":
            self._set_rates(trainer, step)
            return
        loader: Any = trainer.train_dataloader
        if step not in self._left and loader.last_batch not in self.fault.batches:
            return
        self._left.discard(step)
        self.hit.append(self._taken)
        if self.fault.kind in ("nan_gradient", "inf_gradient"):
            value = torch.nan if self.fault.kind == "nan_gradient" else torch.inf
            parameter = next(p for p in pl_module.parameters() if p.requires_grad)
            self._hooks.append(parameter.register_hook(lambda gradient: _with_entry(gradient, value)))
        elif isinstance(batch, TextBatch):
            self._spoil_text(batch)
        else:
            self._spoil_tasks(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next batch is sound again."""
        self._loss_factor = 1.0
        while self._hooks:
            self._hooks.pop().remove()

    def _spoil_text(self, batch: TextBatch) -> None:
        if self.fault.kind == "corrupted":
            labelled = batch.labels >= 0
            batch.labels[labelled] = (batch.labels[labelled] + 100) % 256
        else:
            self._loss_factor = torch.nan if self.fault.kind == "nan_loss" else LOSS_FACTOR

    def _spoil_tasks(self, batch: Any) -> None:
        if self.fault.kind == "corrupted":
            batch.query_y.copy_((batch.query_y + 1) % (batch.query_y.max() + 1))
        else:
            batch.query_x.mul_(torch.nan if self.fault.kind == "nan_loss" else INPUT_FACTOR)

    def _set_rates(self, trainer: Trainer, step: int) -> None:
        """Someone sets the rates wrong, once, and right again after so many steps if nothing else has."""
        raised = self._rates_raised_at
        if step in self._left and raised is None:
            self._multiply_rates(trainer, RATE_FACTOR)
            self._rates_raised_at, self._left = step, set()
            self.hit.append(self._taken)
        elif raised is not None and step < raised:
            self._rates_raised_at = None  # training went back, and its rates with it
        elif raised is not None and step == raised + len(self.fault.steps):
            self._multiply_rates(trainer, 1 / RATE_FACTOR)
            self._rates_raised_at = None

    def _multiply_rates(self, trainer: Trainer, factor: float) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def _with_entry(gradient: Tensor, value: float) -> Tensor:
    changed = gradient.clone()
    changed.view(-1)[0] = value
    return changed
