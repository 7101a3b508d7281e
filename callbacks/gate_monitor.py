"""Says early when the gates of a memory have failed, before the rest of a long run is spent on it."""

from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, distributed

from callbacks.charts import Chart, Lines
from callbacks.intervals import checked_interval
from callbacks.loop_state import log_values, logging_step
from callbacks.step_readings import StepReadings
from theria.memory import GateStatistics, TokenGate, gate_faults

_COLUMNS = tuple(f"gate_{name}" for name in GateStatistics._fields)


class UnhealthyGatesError(RuntimeError):
    """The gates have failed at ``step``; ``faults`` says how, in words."""

    def __init__(self, step: int, faults: tuple[str, ...]) -> None:
        super().__init__(f"the gates have failed at step {step}: {'; '.join(faults)}")
        self.step = step
        self.faults = faults


class GateMonitor(Callback):
    """Compares the gates' statistics with a baseline from early training; see ``theria.memory.gate_faults``.

    The statistics are those that the module writes to its ``step_metrics`` at every step: gate_mean,
    gate_std, gate_low, gate_high and gate_token_std (the spread over tokens). The baseline are those of step
    ``baseline_step``, or of the first step after it that has them. From ``check_from`` on, every n steps, a
    check asks whether the memory is still read, attention is still read, the gates depend on their tokens,
    and how the share of decided gates has changed. A step is judged after the next one has begun, so
    on CUDA nothing waits for the device at any step. With several ranks the mean of their statistics decides.

    Loggers get ``gate/faults``, how many there are, and ``gate/polarized_gain`` at every check. A warning
    comes where there are more faults than at the check before. Baseline and checks that are not judged yet
    are part of a checkpoint: a run that resumes or is rolled back goes on from them. A module without gates
    is left alone, which is said once.

    Args:
        baseline_step: optimiser step whose gates are the baseline.
        check_from: first step that is checked.
        every_n_steps: from there on, steps divisible by it are checked.
        closed_below: mean gate under which the memory is never read.
        open_above: mean gate over which attention is never read.
        least_token_std: spread over tokens under which the gates do not depend on their tokens.
        least_gain: change of the share of gates below 0.1 or above 0.9 that is expected since the baseline.
        action: warn goes on, stop raises UnhealthyGatesError.

    Raises:
        TypeError, ValueError: a value is impossible; the message names it.
        MisconfigurationException: the module has gates and no statistics of them in ``step_metrics``.
        UnhealthyGatesError: with action stop, at a check that finds a fault.
    """

    def __init__(
        self,
        baseline_step: int = 100,
        check_from: int = 500,
        every_n_steps: int = 100,
        closed_below: float = 0.01,
        open_above: float = 0.99,
        least_token_std: float = 1e-3,
        least_gain: float = 0.0,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        if action not in ("warn", "stop"):
            raise ValueError(f"action must be warn or stop, got {action!r}")
        if not 1 <= baseline_step < check_from:
            raise ValueError(
                f"expected 1 <= baseline_step < check_from, got baseline_step {baseline_step} and check_from "
                f"{check_from}"
            )
        self.baseline_step = baseline_step
        self.check_from = check_from
        self.every_n_steps = checked_interval(every_n_steps)
        self.thresholds = {
            "closed_below": closed_below,
            "open_above": open_above,
            "least_token_std": least_token_std,
            "least_gain": least_gain,
        }
        self.action = action
        self._readings = StepReadings(0)
        self._pending: list[tuple[int, list[float]]] = []
        self._baseline: tuple[int, list[float]] | None = None
        self._needs_baseline = True
        self._num_faults = 0
        self._seen = 0
        self._running: tuple[Trainer, LightningModule] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The baseline, what waits to be judged, and how many faults the last check found."""
        self._collect()
        self._read()
        return {
            "baseline": None if self._baseline is None else list(self._baseline),
            "pending": [list(waiting) for waiting in self._pending],
            "faults": self._num_faults,
            "seen": self._seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the saved run would, and forget what was seen since."""
        self._readings.clear()
        baseline = state_dict["baseline"]
        self._baseline = None if baseline is None else (baseline[0], baseline[1])
        self._pending = [(step, values) for step, values in state_dict["pending"]]
        self._needs_baseline = baseline is None and not self._pending
        self._num_faults = state_dict["faults"]
        self._seen = state_dict["seen"]

    def charts(self, trainer: Trainer) -> list[Chart]:
        """What the checks find, where there are gates to check."""
        if not _has_gates(trainer.lightning_module):
            return []
        first_check = -(-self.check_from // self.every_n_steps) * self.every_n_steps
        tags = ("gate/faults", "gate/polarized_gain")
        return [Lines("Gates", "Faults, and more decided gates than at first", tags, first_check)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for gates."""
        self._seen = trainer.global_step
        if _has_gates(pl_module):
            self._running = trainer, pl_module
        else:
            rank_zero_info(f"{type(self).__name__}: {type(pl_module).__name__} has no gates to watch")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Judge what was queued when the step before began, then queue the step that has just ended."""
        if self._running is None:
            return
        self._judge(trainer, before=trainer.global_step)
        self._collect(needed=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last steps."""
        if self._running is None:
            return
        self._collect(needed=True)
        self._running = None
        self._judge(trainer, before=trainer.global_step + 1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the training."""
        self._running = None

    def _collect(self, *, needed: bool = False) -> None:
        """Queue the statistics of the last step if they are asked for and not queued yet."""
        if self._running is None:
            return
        trainer, pl_module = self._running
        step = trainer.global_step
        if step == self._seen:
            return
        if self._is_due(step):
            values = self._statistics(trainer, pl_module)
            if values is None and needed:
                raise MisconfigurationException(
                    f"{type(self).__name__} reads {', '.join(_COLUMNS)} in the module's step_metrics, and "
                    f"{type(pl_module).__name__} wrote none at step {step}: leave the callback out, or append"
                    " theria.memory.gate_statistics of the gates there"
                )
            if values is None:
                return  # a checkpoint within a step, whose row comes later
            self._readings.put(step, 0, values)
            self._needs_baseline = False
        self._seen = step

    def _is_due(self, step: int) -> bool:
        if self._needs_baseline:
            return step >= self.baseline_step
        return step >= self.check_from and step % self.every_n_steps == 0

    def _statistics(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
        """Those of the last step, (statistics,), on the device or, where they were read before, the host."""
        latest = getattr(getattr(pl_module, "step_metrics", None), "latest", None)
        found = [None if latest is None else latest(name, trainer.global_step) for name in _COLUMNS]
        numbers = [torch.as_tensor(value) for value in found if value is not None]
        if len(numbers) < len(_COLUMNS):
            return None
        values = torch.stack(numbers)
        if trainer.world_size > 1:
            values = values.to(pl_module.device)
            distributed.all_reduce(values)
            values = values / trainer.world_size
        return values

    def _read(self) -> None:
        self._pending += [(reading.step, reading.values) for reading in self._readings.all()]

    def _judge(self, trainer: Trainer, *, before: int) -> None:
        """Take the baseline or check, for steps before a step."""
        self._read()
        due = [waiting for waiting in self._pending if waiting[0] < before]
        self._pending = self._pending[len(due) :]
        for step, values in due:
            if self._baseline is None:
                self._baseline = step, values
                continue
            baseline, current = (
                GateStatistics(*torch.tensor(numbers)) for numbers in (self._baseline[1], values)
            )
            faults = gate_faults(baseline, current, **self.thresholds)
            gain = float(current.polarized_ratio - baseline.polarized_ratio)
            # at the loggers' step of the present batch: a run resumed from before it replaces it
            metrics = {"gate/faults": len(faults), "gate/polarized_gain": gain}
            log_values(trainer, metrics, logging_step(trainer))
            known, self._num_faults = self._num_faults, len(faults)
            if faults and self.action == "stop":
                raise UnhealthyGatesError(step, faults)
            if len(faults) > known:
                rank_zero_warn(str(UnhealthyGatesError(step, faults)))


def _has_gates(module: LightningModule) -> bool:
    return any(isinstance(part, TokenGate) for part in module.modules())
