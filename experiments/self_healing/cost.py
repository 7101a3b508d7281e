"""What watching costs: the time inside the callbacks' hooks beside that of the steps, block by block."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from callbacks import MetricsJSONL, PPLDeltaRollback, RNGState
from experiments.self_healing.jobs import COST_JOBS
from experiments.self_healing.runs import Figures, trainer_of

BLOCK = 100
"""Steps of a block: those of one block of records in metrics.jsonl."""

HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "between_batches")
SAVES = 5
_NEVER = 10**9

Span = Callable[[], float]
"""What has begun and ends now: gives a function that tells the seconds in between."""


class Stopwatch(Callback):
    """Times the hooks of other callbacks, and blocks of steps; stands behind them.

    On CUDA times are between two events of the stream: of a hook, what the device does for it, and what the
    device waits for the host in it.

    Args:
        watched: whose hooks to time.

    Attributes:
        blocks: seconds inside the hooks and of all, of each whole block.
    """

    def __init__(self, watched: list[Callback]) -> None:
        self.blocks: list[tuple[float, float]] = []
        self._watched = watched
        self._begin = _begin_on_host
        self._spans: list[Span] = []
        self._end_block: Callable[[], Span] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand between the trainer and the hooks."""
        for callback in self._watched:
            for name in HOOKS:
                if hasattr(callback, name):
                    vars(callback)[name] = self._timed(getattr(callback, name))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the clock of the device."""
        if pl_module.device.type == "cuda":
            self._begin = _begin_on_cuda

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a block and begin the next."""
        if trainer.global_step % BLOCK:
            return
        if self._end_block is not None:
            total = self._end_block()()
            self.blocks.append((sum(span() for span in self._spans), total))
        self._spans.clear()
        self._end_block = self._begin()

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(hook)
        def call(*args: Any, **kwargs: Any) -> None:
            end = self._begin()
            hook(*args, **kwargs)
            self._spans.append(end())

        return call


def measure(name: str, device: str, blocks: int) -> Figures:
    """Shares of the steps' time that the hooks take, by block, and the seconds that one checkpoint takes."""
    job = COST_JOBS[name]
    seed_everything(0, verbose=False)
    module, data = job.make(0)
    # a checkpoint at step 0 alone
    watched: list[Callback] = [PPLDeltaRollback(job.monitor, every_n_steps=_NEVER), MetricsJSONL()]
    watch = Stopwatch(watched)
    with tempfile.TemporaryDirectory() as directory:
        # the first block warms up, the first step of a block closes the one before
        trainer = trainer_of(job, device, (blocks + 1) * BLOCK, directory, [RNGState(), *watched, watch])
        trainer.fit(module, datamodule=data)
        saved = [_seconds_of_a_save(trainer, Path(directory, f"{index}.ckpt")) for index in range(SAVES)]
    return {
        "job": name,
        "device": device,
        "steps": len(watch.blocks) * BLOCK,
        "step_seconds": statistics.fmean(total for _, total in watch.blocks) / BLOCK,
        "shares": [hooks / total for hooks, total in watch.blocks],
        "save_seconds": statistics.median(saved),
    }


def _seconds_of_a_save(trainer: Trainer, path: Path) -> float:
    started = time.perf_counter()
    trainer.save_checkpoint(path)
    return time.perf_counter() - started


def _begin_on_host() -> Callable[[], Span]:
    started = time.perf_counter()

    def end() -> Span:
        seconds = time.perf_counter() - started
        return lambda: seconds

    return end


def _begin_on_cuda() -> Callable[[], Span]:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def end() -> Span:
        last.record()

        def seconds() -> float:
            last.synchronize()
            return first.elapsed_time(last) / 1e3

        return seconds

    return end
