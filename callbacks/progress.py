"""A progress bar over the whole of training."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's rich progress bar, counting optimiser steps up to `trainer.max_steps` instead of epochs.

    It reads the metrics only on the steps that the trainer logs: reading one waits for the device. Names
    are shown without what stands before their slash. With `max_steps` unset it counts the batches of each
    epoch.

    Args:
        refresh_rate: redraws a second.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new epoch begins a new bar only where epochs are counted."""
        if trainer.max_steps == -1:
            super().on_train_epoch_start(trainer, pl_module)
        elif self.is_enabled and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by what was done."""
        if self.is_disabled:
            return
        if self.train_progress_bar_id is None:  # resumed within an epoch
            self._initialize_train_progress_bar_id()
        counts_steps = trainer.max_steps != -1
        self._update(self.train_progress_bar_id, trainer.global_step if counts_steps else batch_idx + 1)
        if trainer._logger_connector.should_update_logs:
            self._update_metrics(trainer, pl_module)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What modules log with `prog_bar=True`, by the last part of its name."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.rpartition("/")[2]: value for name, value in metrics.items()}

    @property
    def total_train_batches(self) -> int | float:
        """Where the bar ends."""
        max_steps = self.trainer.max_steps
        return super().total_train_batches if max_steps == -1 else max_steps

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_steps == -1:
            return super()._get_train_description(current_epoch)
        return f"{'Steps':{len(self.validation_description)}}"
