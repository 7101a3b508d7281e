"""Takes training back to a healthy checkpoint when its perplexity jumps or a number is not finite."""

import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torch.optim import Optimizer

from callbacks import loop_state
from callbacks.cool_down import CoolDown
from callbacks.intervals import checked_interval
from callbacks.metrics_jsonl import MetricsJSONL
from callbacks.perplexity_baseline import Judgement, PerplexityBaseline
from callbacks.refused_update import UpdateGuard, largest_gradient
from callbacks.resumable_checkpoint import ResumableCheckpoint
from callbacks.rollback_ring import RollbackRing
from callbacks.running_restore import SkippableLoader, add_running_state, restore_running
from callbacks.step_loss import StepLoss
from callbacks.step_readings import Reading, StepReadings
from callbacks.training_health import TRIGGERS, Fault, TrainingHealth, Trigger


class UnhealthyTrainingError(RuntimeError):
    """Training broke and is not taken back any more; ``checkpoint`` is the last healthy one, or None."""

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class Rollback(NamedTuple):
    """What was taken back.

    Attributes:
        fault: that was found.
        step: at which training stood when it was acted upon.
        target: step of the checkpoint that training went back to.
    """

    fault: Fault
    step: int
    target: int


class PPLDeltaRollback(Callback):
    """Goes back to the newest checkpoint known to be healthy where training breaks, and past what broke it.

    Every step is judged by its perplexity, exp(min(loss, 20)), beside a baseline that absorbs no outlier.
    Training is taken back when the trigger is met on ``patience`` steps running, and at once when a loss or a
    gradient is not finite; such a gradient is refused before the optimiser steps (with a gradient scaler that
    is the scaler's part, and no fault). Back come the weights, optimisers, schedulers, gradient scaler,
    random number generators, the position in the data, and the state of the other callbacks. The data around
    the fault are skipped from then on, and with nothing to skip and ``lr_factor`` 1, training is repeated bit
    for bit.

    Checkpoints are written to ``checkpoints/rollback_<step>.ckpt``; one becomes a target only once
    ``healthy_after`` good steps have followed it, and a rollback drops all later ones, those of
    ``ResumableCheckpoint`` too. That of step 0 is a target from the start. All of it survives a kill.

    Adds to the records of ``MetricsJSONL``, which stands after it: perplexity, ppl_delta, is_spike (1 above
    the threshold), rollback_count. On the steps the trainer logs, loggers get ``rollback/ppl_delta``,
    ``rollback/z_score`` and ``rollback/count``, and at a rollback the step it is from and to.

    On CUDA nothing waits for the device at any step: numbers are read, and acted upon, one step later. With
    several ranks the mean of their losses decides for all.

    Args:
        monitor: name of the loss (nats), in what ``training_step`` returns, ``step_metrics`` or ``self.log``.
        trigger: robust (above ``threshold`` and ``z_limit``) or plain (above ``threshold``).
        threshold: of (perplexity - baseline) / baseline.
        z_limit: of log-perplexity's distance from the median, in robust standard deviations.
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
        rollbacks: number of rollbacks of the run so far.
        history: those of this process.

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
        for name, value, least in (
            ("baseline_steps", baseline_steps, 2),
            ("warm_up", warm_up, 1),
            ("patience", patience, 1),
            ("ring_size", ring_size, 1),
            ("healthy_after", healthy_after, 1),
            ("skip_window", skip_window, 0),
            ("cool_down", cool_down, 0),
            ("max_rollbacks", max_rollbacks, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, number in (("threshold", threshold), ("z_limit", z_limit), ("lr_factor", lr_factor)):
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        self.every_n_steps = checked_interval(every_n_steps)
        self.skip_window = skip_window
        self.cool_down = cool_down
        self.max_rollbacks = max_rollbacks
        self.at_cap = at_cap
        self.dirpath = dirpath
        self.rollbacks = 0
        self.history: list[Rollback] = []
        baseline = PerplexityBaseline(baseline_steps, warm_up, threshold, z_limit)
        self._health = TrainingHealth(baseline, trigger, patience)
        self._ring = RollbackRing(ring_size, healthy_after)
        self._loss = StepLoss(monitor)
        self._readings = StepReadings(0)
        self._lower_rates = CoolDown(lr_factor)
        self._guards: dict[Optimizer, UpdateGuard] = {}
        self._fields: dict[int, dict[str, float]] = {}
        self._judged: tuple[int, Judgement] | None = None
        self._gradient: Tensor | None = None
        self._first_batch: int | None = None
        self._step = 0
        self._writing = False
        self._keeps_fields = False
        self._loader: SkippableLoader

    def state_dict(self) -> dict[str, Any]:
        """Baseline, what was bad so far, the ring, and the number of rollbacks."""
        self._observe(self._readings.all())
        return {
            "health": self._health.state_dict(),
            "ring": self._ring.state_dict(),
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the saved run would."""
        self._health.load_state_dict(state_dict["health"])
        self._ring.load_state_dict(state_dict["ring"])
        self.rollbacks = state_dict["rollbacks"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the directory; every rank asks, since the trainer shares the answer."""
        directory = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self._directory = Path(directory)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its body
        recorders = [callback for callback in callbacks if isinstance(callback, MetricsJSONL)]
        if any(callbacks.index(recorder) < callbacks.index(self) for recorder in recorders):
            raise MisconfigurationException(
                f"{type(self).__name__} has to stand before MetricsJSONL in trainer.callbacks, or its "
                "numbers would come too late for the records"
            )
        self._keeps_fields = bool(recorders) and trainer.is_global_zero

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
        there = [step for step in self._ring.steps if self._path(step).is_file()]
        self._ring.keep_only(trainer.strategy.broadcast(there))
        self._readings = StepReadings(lag=_lag_on(pl_module.device))
        self._guards = {optimizer: UpdateGuard(optimizer) for optimizer in trainer.optimizers}
        self._lower_rates.attach(trainer.optimizers)
        self._lower_rates.active = trainer.global_step < self._health.cool_until
        self._gradient, self._first_batch, self._step = None, None, trainer.global_step
        loop_state.call_between_batches(trainer, functools.partial(self.between_batches, trainer))
        if not self._ring.steps and trainer.global_step == 0:
            self._save(trainer, trusted=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which batch it is."""
        if not self._guards:
            return
        self._loss.begin_batch(trainer)
        if self._first_batch is None:
            self._first_batch = self._loader.last_batch

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Refuse a gradient that is not finite."""
        if not self._guards or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        largest = largest_gradient(optimizer)
        if largest is None:
            return
        self._guards[optimizer].refuse_if(~torch.isfinite(largest))
        so_far = self._gradient
        self._gradient = largest if so_far is None else torch.maximum(so_far, largest)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Queue the numbers of a step that has ended."""
        if not self._guards:
            return
        self._loss.add_batch(trainer, pl_module, outputs)
        if trainer.global_step == self._step:
            return  # the batches of a step are being accumulated
        self._step = trainer.global_step
        loss, gradient = self._loss.take_step(), self._gradient
        values = torch.stack([loss, torch.zeros_like(loss) if gradient is None else gradient.to(loss)])
        if trainer.world_size > 1:
            distributed.all_reduce(values)
            values /= trainer.world_size
        self._readings.put(self._step, self._first_batch or 0, values)
        self._gradient, self._first_batch = None, None
        self._observe(self._readings.due())

    def step_fields(self, step: int) -> dict[str, float]:
        """The numbers of a step for its record; they are read now if they have not been yet."""
        if step not in self._fields:
            self._observe(self._readings.all())
        return self._fields.pop(step, {})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make the ring's own checkpoints such that running training can be set back to them."""
        if self._writing:
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
            self._observe(self._readings.all())
        self._log_judgement(trainer)
        if self._health.fault is not None:
            self._act_on(trainer, self._health.fault)
        elif self._step % self.every_n_steps == 0 and self._step > max(self._ring.steps, default=0):
            self._save(trainer)
        self._lower_rates.active = trainer.global_step < self._health.cool_until

    def _observe(self, readings: Any) -> None:
        for reading in readings:
            self._observe_one(reading)

    def _observe_one(self, reading: Reading) -> None:
        loss, gradient = reading.values
        judged, good = self._health.observe(reading.step, reading.batch, loss, gradient)
        self._ring.observe(reading.step, good=good)
        self._judged = (reading.step, judged)
        if self._keeps_fields:
            self._fields[reading.step] = {
                "perplexity": judged.perplexity,
                "ppl_delta": judged.ppl_delta,
                "is_spike": float(judged.is_spike),
                "rollback_count": float(self.rollbacks),
            }

    def _act_on(self, trainer: Trainer, fault: Fault) -> None:
        target = self._ring.target
        if target is None or self.rollbacks >= self.max_rollbacks:
            self._give_up(fault, target)
            self._health.start_again(self._step + self.cool_down)
            return
        self.rollbacks += 1
        self.history.append(Rollback(fault, self._step, target))
        _log(
            trainer,
            {
                "rollback/count": self.rollbacks,
                "rollback/from_step": fault.first_step,
                "rollback/to_step": target,
            },
        )
        self._roll_back(trainer, target)
        skipped = "none is skipped"
        if self.skip_window:
            window = range(
                max(0, fault.first_batch - self.skip_window), fault.last_batch + self.skip_window + 1
            )
            self._loader.skip(window)
            skipped = f"{window.start} to {window.stop - 1} of the training stream are skipped"
        self._finish_rollback(trainer)
        rank_zero_warn(
            f"training goes back from step {fault.last_step} to step {target}, rollback {self.rollbacks} of "
            f"{self.max_rollbacks}: {fault.reason}; of the batches, {skipped}"
        )

    def _roll_back(self, trainer: Trainer, target: int) -> None:
        checkpoint = trainer.strategy.load_checkpoint(self._path(target), weights_only=True)
        restore_running(trainer, self._loader, checkpoint, leave_out=self)
        self._health.load_state_dict(checkpoint["callbacks"][self.state_key]["health"])
        self._health.start_again(target + self.cool_down)
        self._readings.clear()
        self._gradient, self._first_batch, self._step = None, None, trainer.global_step

    def _finish_rollback(self, trainer: Trainer) -> None:
        """Leave on the disk what a resume has to go on from; the old files go last, in case of a kill."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its body
        dropped = self._ring.drop_after(self._step)
        for callback in callbacks:
            if isinstance(callback, MetricsJSONL):
                callback.start_attempt()
        self._fields.clear()
        for callback in callbacks:
            if isinstance(callback, ResumableCheckpoint):
                callback.set_back(trainer)
        self._remove(trainer, dropped)

    def _give_up(self, fault: Fault, target: int | None) -> None:
        path = None if target is None else self._path(target)
        why = f"{self.rollbacks} of at most {self.max_rollbacks} rollbacks are used up"
        where = f"the last healthy checkpoint is {path}"
        if path is None:
            why, where = "there is no healthy checkpoint to go back to", "training began from one not known"
        message = f"training is not healthy: {fault.reason}; {why}; {where}"
        if self.at_cap == "stop":
            raise UnhealthyTrainingError(message, path)
        rank_zero_warn(message)

    def _save(self, trainer: Trainer, *, trusted: bool = False) -> None:
        self._writing = True
        try:
            trainer.save_checkpoint(self._path(self._step), weights_only=False)
        finally:
            self._writing = False
        self._remove(trainer, self._ring.add(self._step, trusted=trusted))

    def _remove(self, trainer: Trainer, steps: list[int]) -> None:
        if trainer.is_global_zero:
            for step in steps:
                trainer.strategy.remove_checkpoint(self._path(step))

    def _path(self, step: int) -> Path:
        return self._directory / f"rollback_{step:06d}.ckpt"

    def _log_judgement(self, trainer: Trainer) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of Trainer's class body
        if self._judged is None or self._judged[0] % (every or 1) != 0:
            return
        (_, judged), self._judged = self._judged, None
        metrics = {"ppl_delta": judged.ppl_delta, "z_score": judged.z_score, "count": self.rollbacks}
        _log(trainer, {f"rollback/{name}": value for name, value in metrics.items()})

    def _release(self, trainer: Trainer) -> None:
        loop_state.call_nothing_between_batches(trainer)
        self._lower_rates.detach()
        for guard in self._guards.values():
            guard.release()
        self._guards = {}


def _lag_on(device: torch.device) -> int:
    return 1 if device.type == "cuda" else 0


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    loop_state.log_values(trainer, metrics, loop_state.logging_step(trainer) - 1)
