"""Takes training back to a healthy checkpoint when its perplexity jumps or a number is not finite."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from callbacks import loop_state
from callbacks.charts import Chart, Lines, first_row
from callbacks.cool_down import CoolDown
from callbacks.intervals import checked_interval
from callbacks.judged_steps import JudgedSteps, log_between_batches
from callbacks.metrics_jsonl import MetricsJSONL
from callbacks.perplexity_baseline import PerplexityBaseline
from callbacks.resumable_checkpoint import ResumableCheckpoint
from callbacks.rollback_checkpoints import RollbackCheckpoints
from callbacks.rollback_ring import RollbackRing
from callbacks.running_restore import SkippableLoader, add_running_state, restore_running
from callbacks.step_readings import Reading
from callbacks.step_watch import StepWatch
from callbacks.training_health import TRIGGERS, Fault, TrainingHealth, Trigger
from callbacks.unhealthy_training import Rollback, UnhealthyTrainingError
from callbacks.value_checks import check_at_least, check_positive


class PPLDeltaRollback(Callback):
    """Goes back to the newest checkpoint known to be healthy where training breaks, and past what broke it.

    Every step is judged by its perplexity, exp(min(loss, 20)), beside a baseline that absorbs no outlier.
    Training is taken back when the trigger is met on ``patience`` steps running, at once by a step far
    off (``z_alone``), and at once when a loss or a gradient is not finite; such a gradient is refused
    before the optimiser steps (with a gradient scaler that is the scaler's part, and no fault). Back come
    the weights, optimisers, schedulers, gradient scaler, random number generators, the position in the
    data, and the state of the other callbacks. The data around the fault are skipped from then on, and
    with nothing to skip and ``lr_factor`` 1, training is repeated bit for bit.

    Checkpoints are written to ``checkpoints/rollback_<step>.ckpt``; one becomes a target only once
    ``healthy_after`` good steps have followed it, and a rollback drops all later ones, those of
    ``ResumableCheckpoint`` too. That of step 0 is a target from the start. All of it survives a kill.

    Adds perplexity, ppl_delta, is_spike (1 above the threshold) and rollback_count to the records of
    ``MetricsJSONL``, which stands after it. Loggers get ``rollback/ppl_delta``, ``rollback/z_score``,
    ``rollback/spike`` (the largest ppl_delta of the spikes since the last row, 0 for none) and
    ``rollback/count``, and at a rollback the step it is from and to.

    On CUDA nothing waits for the device at any step: numbers are read, and acted upon, one step later. With
    several ranks the mean of their losses decides for all.

    Args:
        monitor: name of the loss (nats), in what ``training_step`` returns, ``step_metrics`` or ``self.log``.
        trigger: robust (above ``threshold`` and ``z_limit``) or plain (above ``threshold``).
        threshold: of (perplexity - baseline) / baseline.
        z_limit: of log-perplexity's distance from the median, in robust standard deviations.
        z_alone: of the same, for a step that robust need not see repeated.
        baseline_steps: span of the baseline and of the window of median and deviation.
        warm_up: steps before the trigger can be met.
        patience: steps running on which it has to be.
        every_n_steps: optimiser steps between two checkpoints.
        ring_size: checkpoints to keep.
        healthy_after: good steps running that make a checkpoint a target.
        skip_window: batches to skip before the first and after the last bad one, which are skipped too;
            0 skips none at all.
        cool_down: steps after a rollback in which only what is not finite is a fault.
        lr_factor: of the learning rates in these steps.
        max_rollbacks: of a run, resumes included.
        at_cap: stop raises UnhealthyTrainingError after as many; warn goes on without.
        dirpath: where checkpoints go; null is the directory `checkpoints` in the run directory.

    Attributes:
        rollbacks, history: number of rollbacks of the run so far, and those of this process.

    Raises:
        TypeError, ValueError: a value is impossible; the message names it.
        MisconfigurationException: the training loader cannot be set back, the module shows no such loss, or
            ``MetricsJSONL`` stands before this callback.
        UnhealthyTrainingError: at the cap, and where there is no healthy checkpoint.
    """

    def __init__(
        self,
        monitor: str = "loss",
        trigger: Trigger = "robust",
        threshold: float = 0.05,
        z_limit: float = 6.0,
        z_alone: float = 12.0,
        baseline_steps: int = 100,
        warm_up: int = 100,
        patience: int = 2,
        every_n_steps: int = 500,
        ring_size: int = 5,
        healthy_after: int = 50,
        skip_window: int = 10,
        cool_down: int = 100,
        lr_factor: float = 1.0,
        max_rollbacks: int = 3,
        at_cap: Literal["stop", "warn"] = "stop",
        dirpath: str | None = None,
    ) -> None:
        if trigger not in TRIGGERS or at_cap not in ("stop", "warn"):
            raise ValueError(
                f"trigger must be one of {TRIGGERS} and at_cap stop or warn: {trigger}, {at_cap}"
            )
        check_at_least(
            baseline_steps=(baseline_steps, 2),
            warm_up=(warm_up, 1),
            patience=(patience, 1),
            ring_size=(ring_size, 1),
            healthy_after=(healthy_after, 1),
            skip_window=(skip_window, 0),
            cool_down=(cool_down, 0),
            max_rollbacks=(max_rollbacks, 0),
        )
        check_positive(
            {"threshold": threshold, "z_limit": z_limit, "z_alone": z_alone, "lr_factor": lr_factor}
        )
        self.every_n_steps = checked_interval(every_n_steps)
        self.skip_window = skip_window
        self.cool_down = cool_down
        self.max_rollbacks = max_rollbacks
        self.at_cap = at_cap
        self.dirpath = dirpath
        self.rollbacks = 0
        self.history: list[Rollback] = []
        baseline = PerplexityBaseline(baseline_steps, warm_up, threshold, z_limit)
        self._health = TrainingHealth(baseline, trigger, patience, z_alone)
        self._ring = RollbackRing(ring_size, healthy_after)
        self._checkpoints = RollbackCheckpoints(self._ring)
        self._watch = StepWatch(monitor)
        self._lower_rates = CoolDown(lr_factor)
        self._judged = JudgedSteps()
        self._loader: SkippableLoader

    def state_dict(self) -> dict[str, Any]:
        """Baseline, what was bad so far, the ring, and the number of rollbacks."""
        self._observe(self._watch.readings.all())
        return {
            "health": self._health.state_dict(),
            "ring": self._ring.state_dict(),
            "rollbacks": self.rollbacks,
            "spike": self._judged.spike,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the saved run would."""
        self._health.load_state_dict(state_dict["health"])
        self._ring.load_state_dict(state_dict["ring"])
        self.rollbacks = state_dict["rollbacks"]
        self._judged.spike = state_dict["spike"]

    def charts(self, trainer: Trainer) -> list[Chart]:
        """Delta, with spikes and rollbacks to see."""
        first, category = first_row(trainer), "Health"
        # each by itself: TensorBoard draws the lines of a run in one colour
        titles = {
            "ppl_delta": "Perplexity beside its baseline, (p - b) / b",
            "spike": "Largest spike since the last point, 0 for none",
            "count": "Rollbacks so far",
            "z_score": "Distance from the median, robust z",
        }
        return [Lines(category, title, (f"rollback/{name}",), first) for name, title in titles.items()]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the directory; every rank asks, since the trainer shares the answer."""
        run = Path(trainer.log_dir or trainer.default_root_dir)
        self._checkpoints.directory = Path(self.dirpath or run / "checkpoints")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its body
        recorders = [callback for callback in callbacks if isinstance(callback, MetricsJSONL)]
        if any(callbacks.index(recorder) < callbacks.index(self) for recorder in recorders):
            raise MisconfigurationException(
                f"{type(self).__name__} has to stand before MetricsJSONL in trainer.callbacks, or its "
                "numbers would come too late for the records"
            )
        self._judged.keeps_fields = bool(recorders) and trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the ring, or begin it where nothing is trained yet."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside of Trainer's class body
            return
        loader: Any = trainer.train_dataloader
        if not isinstance(loader, SkippableLoader):
            raise MisconfigurationException(
                f"{type(self).__name__} needs a training loader that can be set back and skip batches, as "
                f"datamodules.loader.ResumableLoader; {type(loader).__name__} cannot"
            )
        self._loader = loader
        self._judged.every = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        self._checkpoints.forget_missing(trainer)
        self._watch.attach(trainer, _lag_on(pl_module.device))
        self._lower_rates.attach(trainer.optimizers)
        self._lower_rates.active = trainer.global_step < self._health.cool_until
        loop_state.call_between_batches(trainer, functools.partial(self.between_batches, trainer))
        if not self._ring.steps and trainer.global_step == 0:
            self._checkpoints.save(trainer, 0, trusted=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which batch it is."""
        if self._watch.is_attached:
            self._watch.begin_batch(trainer, self._loader)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Refuse a gradient that is not finite."""
        if self._watch.is_attached:
            self._watch.before_optimizer_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge what is known of the steps that have ended."""
        if self._watch.is_attached and self._watch.end_batch(trainer, pl_module, outputs):
            self._observe(self._watch.readings.due())

    def step_fields(self, step: int) -> dict[str, float]:
        """The numbers of a step for its record; they are read now if they have not been yet."""
        if step not in self._judged:
            self._observe(self._watch.readings.all())
        return self._judged.take(step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make the ring's own checkpoints such that running training can be set back to them."""
        if self._checkpoints.is_writing:
            add_running_state(trainer, self._loader, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimisers."""
        self._release(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimisers."""
        self._release(trainer)

    def between_batches(self, trainer: Trainer) -> None:
        """Act on what is known now that the batch, its validation and its logging are done."""
        if loop_state.is_last_batch_of_training(trainer):
            self._observe(self._watch.readings.all())
        self._judged.log(trainer, self.rollbacks)
        if self._health.fault is not None:
            self._act_on(trainer, self._health.fault)
        elif (step := self._watch.step) % self.every_n_steps == 0 and step > max(self._ring.steps, default=0):
            self._checkpoints.save(trainer, step)
        self._lower_rates.active = trainer.global_step < self._health.cool_until

    def _observe(self, readings: Iterable[Reading]) -> None:
        for step, batch, (loss, gradient) in readings:
            judged, good = self._health.observe(step, batch, loss, gradient)
            self._ring.observe(step, good=good)
            self._judged.add(step, judged, self.rollbacks)

    def _act_on(self, trainer: Trainer, fault: Fault) -> None:
        target = self._ring.target
        if target is None or self.rollbacks >= self.max_rollbacks:
            self._give_up(fault, target)
            self._health.start_again(self._watch.step + self.cool_down)
            return
        self.rollbacks += 1
        self.history.append(Rollback(fault, self._watch.step, target))
        values = {"spike": self._judged.spike, "count": self.rollbacks}
        values |= {"from_step": fault.first_step, "to_step": target}
        self._judged.spike = 0.0
        log_between_batches(trainer, values)
        self._roll_back(trainer, target)
        skipped = "none is skipped"
        if (around := self.skip_window) > 0:
            window = range(max(0, fault.first_batch - around), fault.last_batch + around + 1)
            self._loader.skip(window)
            skipped = f"{window.start} to {window.stop - 1} of the training stream are skipped"
        self._finish_rollback(trainer)
        rank_zero_warn(
            f"training goes back from step {fault.last_step} to step {target}, rollback {self.rollbacks} of "
            f"{self.max_rollbacks}: {fault.reason}; of the batches, {skipped}"
        )

    def _roll_back(self, trainer: Trainer, target: int) -> None:
        checkpoint = trainer.strategy.load_checkpoint(self._checkpoints.path(target), weights_only=True)
        restore_running(trainer, self._loader, checkpoint, leave_out=self)
        self._health.load_state_dict(checkpoint["callbacks"][self.state_key]["health"])
        self._health.start_again(target + self.cool_down)
        self._watch.set_back(trainer.global_step)

    def _finish_rollback(self, trainer: Trainer) -> None:
        """Leave on the disk what a resume has to go on from; the old files go last, in case of a kill."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its body
        dropped = self._ring.drop_after(self._watch.step)
        for callback in callbacks:
            if isinstance(callback, MetricsJSONL):
                callback.start_attempt()
        self._judged.clear_fields()
        for callback in callbacks:
            if isinstance(callback, ResumableCheckpoint):
                callback.set_back(trainer)
        self._checkpoints.remove(trainer, dropped)

    def _give_up(self, fault: Fault, target: int | None) -> None:
        path = None if target is None else self._checkpoints.path(target)
        why = f"{self.rollbacks} of at most {self.max_rollbacks} rollbacks are used up"
        where = f"the last healthy checkpoint is {path}"
        if path is None:
            why, where = "there is no healthy checkpoint to go back to", "training began from one not known"
        message = f"training is not healthy: {fault.reason}; {why}; {where}"
        if self.at_cap == "stop":
            raise UnhealthyTrainingError(message, path)
        rank_zero_warn(message)

    def _release(self, trainer: Trainer) -> None:
        loop_state.call_nothing_between_batches(trainer)
        self._lower_rates.detach()
        self._watch.release()


def _lag_on(device: torch.device) -> int:
    return 1 if device.type == "cuda" else 0
