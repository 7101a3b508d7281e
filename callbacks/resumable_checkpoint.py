"""Checkpoints from which training goes on exactly, under manual optimisation as under automatic."""

import functools
import re
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from callbacks import loop_state
from callbacks.intervals import checked_interval

CHECKPOINT_NAME = re.compile(r"step_(\d+)\.ckpt")


class ResumableCheckpoint(Checkpoint):
    """Saves `checkpoints/step_<step>.ckpt` in the run directory every n steps and where training ends.

    A step is saved once it is validated, where it is, and logged. A run that resumes from any of these files
    repeats no batch, no validation and no logged row and leaves none out, in the middle of an epoch and at
    its end.

    SIGTERM leaves a checkpoint of the last finished step, and so does Ctrl-C inside a validation; in the
    middle of a step there is nothing from which training could go on exactly, so no other exception
    leaves one, and with several processes, which are not interrupted at the same step, none does.

    With `monitor`, every validation that gives one of the `save_top_k` best values is saved too and kept.

    Args:
        every_n_steps: optimiser steps between two checkpoints.
        keep_last: how many of the newest to keep.
        monitor: name of a logged validation metric; null keeps only the newest.
        mode: "min" or "max", what is best in `monitor`.
        save_top_k: how many of the best to keep.
        dirpath: where to write; null is the directory `checkpoints` in the run directory.

    Raises:
        TypeError, ValueError: a value is impossible; the message names it.
        MisconfigurationException: validation is scheduled by the clock, or `monitor` is not logged.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        keep_last: int = 3,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        dirpath: str | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode!r}")
        for name, value in (("keep_last", keep_last), ("save_top_k", save_top_k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.every_n_steps = checked_interval(every_n_steps)
        self.keep_last = keep_last
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.dirpath = dirpath
        self.last_model_path = ""
        self._scores: dict[str, float] = {}
        self._metrics: dict[str, Tensor] = {}
        self._saved_step = 0

    @property
    def state_key(self) -> str:
        """Of its own for each metric, so that several of these may be used together."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def best_model_path(self) -> str:
        """The checkpoint with the best value of `monitor`, or an empty string."""
        ranked = self._ranked()
        return str(self._directory / ranked[0]) if ranked else ""

    @property
    def best_model_score(self) -> float | None:
        """The best value of `monitor` so far."""
        ranked = self._ranked()
        return self._scores[ranked[0]] if ranked else None

    def state_dict(self) -> dict[str, Any]:
        """The values of the best checkpoints, by file name."""
        return {"scores": dict(self._scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best checkpoints that are still there."""
        self._scores = {
            name: score for name, score in state_dict["scores"].items() if (self._directory / name).exists()
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the directory; every rank asks, since the trainer shares the answer."""
        directory = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self._directory = Path(directory)
        if stage == "fit" and getattr(trainer, "_val_check_time_interval", None) is not None:
            raise MisconfigurationException(
                f"{type(self).__name__} cannot resume a validation that the clock schedules: set "
                "trainer.val_check_interval to a number of batches or a share of an epoch"
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring the loops into the form that resumes exactly; keep what was logged, for an epoch's end."""
        if "callback_metrics" in checkpoint:
            return  # another instance has done it
        loop_state.normalise(trainer, checkpoint["loops"]["fit_loop"])
        checkpoint["callback_metrics"] = {
            name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what validation had logged until training starts."""
        self._metrics = checkpoint.get("callback_metrics", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the epoch where it was left."""
        loop_state.take_up_epoch(trainer)
        loop_state.call_between_batches(trainer, functools.partial(self._save_if_due, trainer))
        trainer.callback_metrics.update(self._metrics)
        self._saved_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the validated step."""
        if self.monitor is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._rank(trainer, self.monitor)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step if nothing told beforehand that it would be."""
        loop_state.call_nothing_between_batches(trainer)
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last finished step where training stands between two steps."""
        loop_state.call_nothing_between_batches(trainer)
        if trainer.world_size > 1 or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        stopped = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        between_batches = isinstance(exception, SIGTERMException) and not trainer.validating
        if stopped and (between_batches or loop_state.inside_validation(trainer)):
            self._save(trainer)

    def set_back(self, trainer: Trainer) -> None:
        """Save the step that training was set back to, then remove the checkpoints of later ones.

        A kill in between leaves one from which training comes to the same place again. Every rank has to
        call it.
        """
        now = trainer.global_step
        self._scores = {name: score for name, score in self._scores.items() if _step_of(name) <= now}
        self._saved_step = -1  # the file of this step, if there is one, is of the training that is undone
        self._save(trainer)
        if trainer.is_global_zero:
            for path in self._directory.iterdir():
                if CHECKPOINT_NAME.fullmatch(path.name) and _step_of(path.name) > now:
                    trainer.strategy.remove_checkpoint(path)

    def _save_if_due(self, trainer: Trainer) -> None:
        due = trainer.global_step % self.every_n_steps == 0
        best = _file_name(trainer) in self._scores
        if due or best or loop_state.is_last_batch_of_training(trainer):
            self._save(trainer)

    def _rank(self, trainer: Trainer, monitor: str) -> None:
        value = trainer.callback_metrics.get(monitor)
        if value is None:
            raise MisconfigurationException(
                f"{type(self).__name__} monitors {monitor!r}, which validation did not log; it logged "
                f"{sorted(trainer.callback_metrics)}"
            )
        # Values may differ over ranks, the decision must not: saving is a collective call.
        score = trainer.strategy.broadcast(float(value))
        self._scores[_file_name(trainer)] = score
        self._scores = {name: self._scores[name] for name in self._ranked()[: self.save_top_k]}

    def _ranked(self) -> list[str]:
        """The names of scored checkpoints, the best first and of equals the earliest; NaN is never good."""
        sign = 1.0 if self.mode == "min" else -1.0
        finite = [name for name, score in self._scores.items() if score == score]
        return sorted(finite, key=lambda name: (sign * self._scores[name], name))

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        dry_run = trainer.fast_dev_run  # type: ignore[attr-defined]  # set outside of Trainer's class body
        if dry_run or step == self._saved_step:
            return
        for logger in trainer.loggers:
            logger.save()
        path = self._directory / _file_name(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_step = step
        self.last_model_path = str(path)
        if trainer.is_global_zero:
            self._remove_old(trainer, step)

    def _remove_old(self, trainer: Trainer, step: int) -> None:
        steps = {
            path: int(match[1])
            for path in self._directory.iterdir()
            if (match := CHECKPOINT_NAME.fullmatch(path.name))
        }
        # A file of a later step is of no run that this one goes on with; it is left alone.
        written = sorted((path for path in steps if steps[path] <= step), key=steps.__getitem__)
        for path in written[: -self.keep_last]:
            if path.name not in self._scores:
                trainer.strategy.remove_checkpoint(path)


def _step_of(name: str) -> int:
    return int(name.removeprefix("step_").removesuffix(".ckpt"))


def _file_name(trainer: Trainer) -> str:
    return f"step_{trainer.global_step:06d}.ckpt"
