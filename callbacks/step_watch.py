"""Loss and gradients of every optimiser step: bad gradients are refused, numbers brought to the host."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed
from torch.optim import Optimizer

from callbacks.refused_update import UpdateGuard, largest_gradient
from callbacks.running_restore import SkippableLoader
from callbacks.step_loss import StepLoss
from callbacks.step_readings import StepReadings


class StepWatch:
    """Between `attach` and `release`, refuses gradients that are not finite and queues the numbers of steps.

    They are the loss and the largest gradient; with several ranks both are means over them, which are not
    finite where one of them is not.

    Args:
        monitor: name of the loss, see `StepLoss`.

    Attributes:
        step: the newest that ended.
        readings: the queue of numbers.
    """

    def __init__(self, monitor: str) -> None:
        self.step = 0
        self.readings = StepReadings(0)
        self._loss = StepLoss(monitor)
        self._guards: dict[Optimizer, UpdateGuard] = {}
        self._gradient: Tensor | None = None
        self._first_batch: int | None = None

    @property
    def is_attached(self) -> bool:
        """Whether there are optimisers to watch."""
        return bool(self._guards)

    def attach(self, trainer: Trainer, lag: int) -> None:
        """Begin, with numbers that are read so many steps late."""
        self.readings = StepReadings(lag)
        self._guards = {optimizer: UpdateGuard(optimizer) for optimizer in trainer.optimizers}
        self.set_back(trainer.global_step)

    def release(self) -> None:
        """Let go of the optimisers."""
        for guard in self._guards.values():
            guard.release()
        self._guards = {}

    def set_back(self, step: int) -> None:
        """Forget what has not been read; training goes on after this step."""
        self.readings.clear()
        self._loss.clear()
        self._gradient, self._first_batch, self.step = None, None, step

    def begin_batch(self, trainer: Trainer, loader: SkippableLoader) -> None:
        """Note which batch it is."""
        self._loss.begin_batch(trainer)
        if self._first_batch is None:
            self._first_batch = loader.last_batch

    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Refuse the step if its gradient is not finite, unless a gradient scaler does."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        largest = largest_gradient(optimizer)
        if largest is None:
            return
        self._guards[optimizer].refuse_if(~torch.isfinite(largest))
        so_far = self._gradient
        self._gradient = largest if so_far is None else torch.maximum(so_far, largest)

    def end_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> bool:
        """Queue the numbers of a step that has ended; whether one has."""
        self._loss.add_batch(trainer, pl_module, outputs)
        if trainer.global_step == self.step:
            return False  # the batches of a step are being accumulated
        self.step = trainer.global_step
        loss, gradient = self._loss.take_step(), self._gradient
        values = torch.stack([loss, torch.zeros_like(loss) if gradient is None else gradient.to(loss)])
        if trainer.world_size > 1:
            distributed.all_reduce(values)
            values /= trainer.world_size
        self.readings.put(self.step, self._first_batch or 0, values)
        self._gradient, self._first_batch = None, None
        return True
