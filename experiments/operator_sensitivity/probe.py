"""Operator-level signal, measured every so many outer steps of a run and kept out of its timings."""

import statistics
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from experiments.operator_sensitivity.runs import Run
from lightning_modules import MetaSeqClassifier
from theria.curvature import second_order_signal
from theria.curvature.verdicts import one_line
from theria.tasks.synthetic_seqcls import TaskBatch


class OperatorProbe(Callback):
    """FULL beside FO meta-gradient, and the attention's second-order path, before every n-th outer step.

    Both meta-gradients are taken at the run's own parameters and tasks, whatever mode trains, so that the
    numbers of a FULL and of an FO run say the same thing about different parameters.

    Args:
        run: what is being trained.
        every: outer steps between two measurements; the first one is before the first step.

    Attributes:
        rel_diff: |g_FULL - g_FO| / |g_FULL| over all parameters, by measurement.
        attn_rel_diff: the same over q_proj, k_proj and v_proj: the attention-local second-order signal.
        attn_path: see `theria.curvature.SecondOrderSignal`.
        seconds: what each measurement took.
        failure: the error that ended the measurements, or nothing.
        peak_bytes: largest CUDA memory of the training around the measurements; 0 on a CPU.
    """

    def __init__(self, run: Run, every: int) -> None:
        self.run, self.every = run, every
        self.rel_diff: list[float] = []
        self.attn_rel_diff: list[float] = []
        self.attn_path: list[float] = []
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self.failure = ""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TaskBatch, batch_idx: int
    ) -> None:
        """Measure, if it is time to."""
        if trainer.global_step % self.every:
            return
        assert isinstance(pl_module, MetaSeqClassifier)
        self.note_peak()
        started = time.perf_counter()
        try:
            if not self.failure:
                self._measure(pl_module, batch)
        except RuntimeError as error:  # attention without a second derivative trains in FO all the same
            self.failure = one_line(error)
        if self.run.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.seconds.append(time.perf_counter() - started)

    def note_peak(self) -> None:
        """Take up the training's peak so far; on CUDA, wait for it."""
        if self.run.device == "cuda":
            torch.cuda.synchronize()
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())

    def _measure(self, module: MetaSeqClassifier, batch: TaskBatch) -> None:
        support, query = (batch.support_x, batch.support_y), (batch.query_x, batch.query_y)
        found = second_order_signal(
            module.model,
            support,
            query,
            inner_steps=self.run.inner_steps,
            inner_lr=self.run.inner_lr,
        )
        self.rel_diff.append(found.rel_diff)
        self.attn_rel_diff.append(found.attn_rel_diff)
        self.attn_path.append(found.attn_path.magnitude)

    def mean(self, values: list[float]) -> float:
        """Over the measurements; NaN if there was none."""
        return statistics.fmean(values) if values else float("nan")
