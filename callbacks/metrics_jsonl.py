"""Writes every training step to ``metrics.jsonl``: no crash loses a step that a checkpoint builds on."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from callbacks.metrics_file import MetricsFile

Rows = list[dict[str, float]]

_IN_LINE = ("loss", "lm_loss", "perplexity", "ppl_delta", "gate_mean", "learning_rate", "rollback_count")
"""What a line of the log tells of a step, where its record has it."""


@runtime_checkable
class StepRows(Protocol):
    """What a module's ``step_metrics`` offers: blocks of per-step rows, on request or when it is full."""

    def subscribe(self, receive: Callable[[Rows], None]) -> None:
        """Hand every flushed block to ``receive``."""

    def unsubscribe(self, receive: Callable[[Rows], None]) -> None:
        """Stop handing blocks to ``receive``."""

    def flush(self, *, reduce: bool = True) -> None:
        """Hand over what is waiting; with ``reduce`` a collective call where several ranks train."""


@runtime_checkable
class StepFields(Protocol):
    """A callback with metrics of its own for the records of single steps."""

    def step_fields(self, step: int) -> Mapping[str, float]:
        """Those of a finished step, asked for once; a name that the module records too is the module's."""


class MetricsJSONL(Callback):
    """One record per optimiser step in ``<trainer.log_dir>/<filename>``; ``read_metrics`` reads it back.

    Records are written in blocks: those of the module's ``step_metrics`` buffer where it has one, else of
    ``flush_every`` steps of what the module logs with ``self.log`` in the batch that finished the step (read
    from the device once a block). Before every checkpoint, after an exception and at the end of fit the rest
    is written and forced to the disk. A checkpoint of weights only, from which no run can resume, is no such
    event. Validation results are records of their own. Only rank zero writes, and what an exception leaves
    over are rank zero's own values, since other ranks may not be there to average with. ``fast_dev_run``
    writes nothing.

    Callbacks with ``step_fields``, as PPLDeltaRollback has them, add theirs to the records of the steps; they
    stand before this one in the list of callbacks.

    Every fit opens a new attempt in the file, and so does ``start_attempt``; nothing is rewritten.

    The timestamp of a record is the host's time at the end of its batch.

    Of every ``line_every_n_steps`` steps one is told in a line of the program's log as well, when it is
    written.

    Args:
        filename: name of the file in the run's directory.
        flush_every: steps in a block of a module that has no ``step_metrics``.
        line_every_n_steps: steps between two lines of the log; 0 writes none.

    Raises:
        ValueError: ``flush_every`` is not a positive integer, ``line_every_n_steps`` none from 0 on, or the
            trainer has no directory to log to.
    """

    def __init__(
        self, filename: str = "metrics.jsonl", flush_every: int = 100, line_every_n_steps: int = 100
    ) -> None:
        for name, value, least in (
            ("flush_every", flush_every, 1),
            ("line_every_n_steps", line_every_n_steps, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
        self.filename = filename
        self.flush_every = flush_every
        self.line_every_n_steps = line_every_n_steps
        self._path: Path | None = None
        self._file: MetricsFile | None = None
        self._trainer: Trainer | None = None
        self._buffer: StepRows | None = None
        self._received: Rows = []
        self._sources: list[StepFields] = []
        self._logged: list[tuple[int, dict[str, Tensor]]] = []
        self._before: dict[str, Tensor] = {}
        self._step = 0
        self._ended_at: dict[int, float] = {}

    def start_attempt(self) -> None:
        """Open a new attempt in the file, for a rollback: call it once the trainer's step is set back.

        Rows of the steps so far are forced to the disk as part of the attempt that ends. Every rank has to
        call it.

        Raises:
            RuntimeError: no fit is running.
        """
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__name__}.start_attempt needs a running fit")
        self._flush()
        self._ended_at.clear()
        self._step = self._trainer.global_step
        if self._file is not None:
            self._file.start_attempt(step=self._step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's directory before training; every rank asks, since the trainer shares the answer."""
        self._path = None
        dry_run = trainer.fast_dev_run  # type: ignore[attr-defined]  # set outside of Trainer's class body
        if stage != "fit" or dry_run:
            return
        directory = trainer.log_dir
        if directory is None:
            raise ValueError(
                f"{type(self).__name__} has no directory for {self.filename}: trainer.log_dir is None; "
                "give the trainer a logger with a save_dir"
            )
        self._path = Path(directory) / self.filename

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file's next attempt, after any restore and after the sanity check."""
        self._release()
        if self._path is None:
            return
        self._trainer = trainer
        self._step = trainer.global_step
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its class body
        self._sources = [callback for callback in callbacks if isinstance(callback, StepFields)]
        if trainer.is_global_zero:
            self._file = MetricsFile(self._path, step=self._step)
        buffer = getattr(pl_module, "step_metrics", None)
        if isinstance(buffer, StepRows):
            # Rows left over from an earlier run belong to none of this one's attempts.
            buffer.flush()
            buffer.subscribe(self._receive)
            self._buffer = buffer

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what was logged before this batch."""
        if self._file is not None and self._buffer is None:
            self._before = _scalars(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note when the step ended, and what it logged where the module keeps no rows of its own."""
        if self._file is None:
            return
        self._ended_at.setdefault(trainer.global_step, time.time())
        self._collect(trainer)
        self._write_received()
        if len(self._logged) >= self.flush_every:
            self._write_logged()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was logged before this validation run."""
        if self._file is not None:
            self._before = _scalars(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the steps so far and then the validation's results."""
        self._flush()
        if self._file is None:
            return
        metrics = _to_host([(trainer.global_step, _changed(self._before, _scalars(trainer)))])
        self._file.append("validation", [(time.time(), row) for row in metrics])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Force every step that the checkpoint contains to the disk, before the checkpoint is written."""
        self._flush()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Force what was recorded to the disk; a device or a disk that failed may refuse."""
        for finish in (partial(self._flush, reduce=False), self._release):
            try:
                finish()
            except (RuntimeError, OSError) as failure:
                rank_zero_warn(f"the last block of steps is missing in {self._path}: {failure}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Force the last steps to the disk and let go of the file and the buffer."""
        self._flush()
        self._release()

    def _collect(self, trainer: Trainer) -> None:
        """Keep what a newly finished step logged; a batch that only accumulates finishes none."""
        if self._buffer is not None or trainer.global_step <= self._step:
            return
        self._step = trainer.global_step
        self._logged.append((self._step, _changed(self._before, _scalars(trainer))))

    def _flush(self, *, reduce: bool = True) -> None:
        """Write every step so far and force it to the disk; all ranks come here at the same places."""
        if self._trainer is None:
            return
        if self._buffer is not None:
            self._buffer.flush(reduce=reduce)
        self._write_received()
        if self._file is not None:
            self._collect(self._trainer)
            self._write_logged()
            self._file.sync()

    def _receive(self, rows: Rows) -> None:
        """Keep a block until the batch has ended: other callbacks may not have seen its last step yet."""
        self._received += rows

    def _write_received(self) -> None:
        received, self._received = self._received, []
        if received:
            self._write_rows(received)

    def _write_logged(self) -> None:
        logged, self._logged = self._logged, []
        if logged:
            self._write_rows(_to_host(logged))

    def _write_rows(self, rows: Rows) -> None:
        if self._file is None:
            return
        now = time.time()
        for row in rows:
            for source in self._sources:
                row.update({k: v for k, v in source.step_fields(int(row["step"])).items() if k not in row})
        self._file.append("train", [(self._ended_at.pop(int(row["step"]), now), row) for row in rows])
        for row in rows:
            if self.line_every_n_steps and int(row["step"]) % self.line_every_n_steps == 0:
                rank_zero_info(_line(row))

    def _release(self) -> None:
        if self._buffer is not None:
            self._buffer.unsubscribe(self._receive)
        file, self._trainer, self._buffer, self._file = self._file, None, None, None
        self._logged, self._received, self._before, self._sources = [], [], {}, []
        self._ended_at.clear()
        if file is not None:
            file.close()


def _line(row: Mapping[str, float]) -> str:
    values = (f"{name} {row[name]:.4g}" for name in _IN_LINE if name in row)
    return f"step {int(row['step'])}: " + ", ".join(values)


def _scalars(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: value.detach().reshape(())
        for name, value in trainer.callback_metrics.items()
        if isinstance(value, Tensor) and value.numel() == 1
    }


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scalars logged in between: the trainer keeps old ones, and a new one has memory of its own."""
    return {
        name: value
        for name, value in after.items()
        if name not in before or value.data_ptr() != before[name].data_ptr()
    }


def _to_host(logged: list[tuple[int, dict[str, Tensor]]]) -> Rows:
    """Rows of numbers, read in one transfer from each device that a module logs from."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, scalars in logged:
        for value in scalars.values():
            by_device.setdefault(value.device, []).append(value)
    numbers = {device: iter(torch.stack(values).tolist()) for device, values in by_device.items()}
    return [
        {"step": step} | {name: next(numbers[value.device]) for name, value in scalars.items()}
        for step, scalars in logged
    ]
