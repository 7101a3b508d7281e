"""Early stopping whose decision survives a kill, and which a resume can be told to take back."""

from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info

from callbacks.value_checks import check_at_least


class ResumableEarlyStopping(EarlyStopping):
    """Stops training when a validation metric has not become better for some validations.

    Lightning's, but the configured patience counts after a resume, not the checkpoint's: a run that ran out
    of patience stays stopped when it is resumed, and goes on when it is given more.

    Args:
        monitor: name of a logged validation metric.
        mode: "min" or "max", what is better.
        patience: validations running that may bring nothing better.
        min_delta: by how much a value has to be better.
        stopping_threshold: stop once the metric is better than this; null for never.
        divergence_threshold: stop once it is worse than this; null for never.

    Raises:
        ValueError: ``patience`` is below 1, or ``mode`` is neither.
        MisconfigurationException: validation did not log ``monitor``.
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        check_at_least(patience=(patience, 1))
        super().__init__(
            monitor,
            min_delta=min_delta,
            patience=patience,
            verbose=True,
            mode=mode,
            stopping_threshold=stopping_threshold,
            divergence_threshold=divergence_threshold,
            check_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all but the patience."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stay stopped."""
        out_of_patience = self.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED
        if out_of_patience and self.wait_count >= self.patience:
            trainer.should_stop = True
            rank_zero_info(
                f"training stopped because {self.monitor} had not become better in {self.wait_count} "
                f"validations: to go on, give {type(self).__name__} more patience or leave it out"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the validated step."""
        checked = not (trainer.fast_dev_run or self._should_skip_check(trainer))  # type: ignore[attr-defined]
        if checked and self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"{type(self).__name__} monitors {self.monitor!r}, which validation did not log; it logged "
                f"{sorted(trainer.callback_metrics)}"
            )
        super().on_validation_end(trainer, pl_module)
