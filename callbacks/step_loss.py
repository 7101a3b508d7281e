"""The loss of each optimiser step, wherever a module shows it."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


class StepLoss:
    """Finds a named loss of every batch and means it over the batches of a step, without reading a device.

    It is looked for in what ``training_step`` returned (a loss, or a dictionary), then in the newest row of
    the module's ``step_metrics``, then in what the batch logged with ``self.log``.

    Args:
        name: of the loss.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_logged = False
        self._logged_before: Tensor | None = None
        self._losses: list[Tensor] = []

    def begin_batch(self, trainer: Trainer) -> None:
        """Remember what stood in the log before this batch."""
        if self._is_logged:  # asking the trainer takes time
            self._logged_before = trainer.callback_metrics.get(self.name)

    def add_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        """Add the loss of a batch that has just ended.

        Raises:
            MisconfigurationException: the module shows none of this name.
        """
        value = self._find(trainer, pl_module, outputs)
        if value is None:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} shows no {self.name!r} at step {trainer.global_step}: return it "
                "from training_step, add it to step_metrics there, or log it there with self.log at every "
                f"step; logged so far: {sorted(trainer.callback_metrics)}"
            )
        loss = torch.as_tensor(value, dtype=torch.float64, device=pl_module.device)
        self._losses.append(loss.detach().reshape(()))

    def clear(self) -> None:
        """Forget the batches of a step that is not taken."""
        self._losses = []

    def take_step(self) -> Tensor:
        """The mean over the batches since the last step, 0-dimensional float64 on the module's device."""
        losses, self._losses = self._losses, []
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _find(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Tensor | float | None:
        if isinstance(outputs, Mapping) and self.name in outputs:
            value: Tensor | float = outputs[self.name]
            # Lightning has divided it for the sum over a step's batches
            divided = self.name == "loss" and pl_module.automatic_optimization
            return value * trainer.accumulate_grad_batches if divided else value
        latest = getattr(getattr(pl_module, "step_metrics", None), "latest", None)
        if latest is not None and (value := latest(self.name, trainer.global_step)) is not None:
            return value
        logged, before = trainer.callback_metrics.get(self.name), self._logged_before
        # the trainer keeps an old value; a new one has memory of its own
        if logged is None or (before is not None and logged.data_ptr() == before.data_ptr()):
            return None
        self._is_logged = True
        return logged
