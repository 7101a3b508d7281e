"""Whether second order is still there while training runs: a sparse probe on tasks of its own."""

import time
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.charts import Chart, Lines
from callbacks.intervals import checked_interval
from callbacks.loop_state import log_values, logging_step
from theria.curvature import SecondOrderSignal, second_order_signal
from theria.curvature.verdicts import one_line
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks


class CurvatureProbe(Callback):
    """Logs the second-order signal of a meta-learned classifier every n outer steps.

    - ``curvature/attn_magnitude``: |H u| / |H_ref u| of the support loss in the space of q_proj, k_proj and
      v_proj, beside the explicit softmax in float64 at the same parameters: 1 for sound attention, 0 where
      its curvature is gone;
    - ``curvature/rel_diff``: |g_FULL - g_FO| / |g_FULL|, the part of the meta-gradient that second order
      makes, and ``curvature/attn_rel_diff``, the same over the attention's projections;
    - ``curvature/probe_seconds``: what the measurement took, and ``curvature/probe_share``: the part of the
      time since training began that all of them took.

    The probe tasks are the same at every measurement and in every run of this seed, drawn from a
    counter-based generator of their own as the data's are; no other generator is touched, nothing of the
    module changes, and training goes on bit for bit as without the callback. The outer step after a
    measurement counts its time in ``perf/step_seconds``. Only rank zero measures.

    A magnitude below 1% is warned of once. So is attention that refuses to be differentiated twice; then the
    measurements end, and training, which may be first order, goes on.

    Args:
        every_n_steps: outer steps between two measurements; the first one is after n steps.
        tasks: probe tasks, each of the data module's sizes.
        seed: of the probe tasks and of the direction in which curvature is taken.

    Raises:
        TypeError, ValueError: ``every_n_steps`` or ``tasks`` is not a positive integer.
        MisconfigurationException: at the start of a fit, if the module has no meta-learned sequence
            classifier or the data module no tasks to draw.
    """

    needs_whole_parameters = True

    def __init__(self, every_n_steps: int = 100, tasks: int = 4, seed: int = 0) -> None:
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"tasks must be a positive integer, got {tasks!r}")
        self.every_n_steps = checked_interval(every_n_steps)
        self.tasks = tasks
        self.seed = seed
        self._last_step = 0
        self._started = 0.0
        self._seconds = 0.0
        self._ended = False
        self._warned = False

    def charts(self, trainer: Trainer) -> list[Chart]:
        """The part of the meta-gradient that second order makes, and the attention's curvature."""
        category, first = "Gradients and curvature", self.every_n_steps
        difference = ("curvature/rel_diff", "curvature/attn_rel_diff")
        return [
            Lines(category, "|FULL - FO| / |FULL|, all and attention alone", difference, first),
            Lines(category, "Attention curvature, 1 where it is whole", ("curvature/attn_magnitude",), first),
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to measure, before anything is trained."""
        of, needed = type(pl_module).__name__, {"inner_steps", "inner_lr"}
        if not isinstance(getattr(pl_module, "model", None), SeqClassifier) or not needed <= set(
            pl_module.hparams
        ):
            raise MisconfigurationException(
                f"{type(self).__name__} measures the meta-learned SeqClassifier in `model`, as"
                f" MetaSeqClassifier has it; {of} has none: leave the callback out"
            )
        data = getattr(trainer, "datamodule", None)
        if not isinstance(getattr(data, "spec", None), SeqClsSpec):
            raise MisconfigurationException(
                f"{type(self).__name__} draws tasks like the data module's `spec`, as SyntheticSeqCls has it;"
                f" {type(data).__name__} has none: leave the callback out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock that the probe's share is of."""
        self._last_step, self._started, self._seconds = trainer.global_step, time.perf_counter(), 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when the number of finished optimiser steps passes a multiple of n."""
        last_step, self._last_step = self._last_step, trainer.global_step
        due = self._last_step // self.every_n_steps != last_step // self.every_n_steps
        if not due or self._ended or not trainer.is_global_zero:
            return
        if pl_module.device.type == "cuda":
            # what training has queued is not the probe's cost
            torch.cuda.synchronize(pl_module.device)
        started = time.perf_counter()
        try:
            found = self._measure(trainer, pl_module)
        except (
            RuntimeError
        ) as error:  # attention without a second derivative learns in first order all the same
            self._ended = True
            rank_zero_warn(
                f"{type(self).__name__}: second order raises at step {self._last_step}, so that measurements"
                f" end: {one_line(error)}"
            )
            return
        now = time.perf_counter()
        self._seconds += now - started
        self._log(trainer, found, seconds=now - started, share=self._seconds / (now - self._started))

    def _measure(self, trainer: Trainer, pl_module: Any) -> SecondOrderSignal:
        model, hparams = pl_module.model, pl_module.hparams
        batch = sample_tasks(
            trainer.datamodule.spec,  # type: ignore[attr-defined]  # set outside of Trainer's class body
            torch.arange(self.tasks, device=pl_module.device),
            seed=self.seed,
            epoch=0,
            stream="validation",
            dtype=model.head.weight.dtype,
        )
        # in the precision of the training steps
        with trainer.precision_plugin.forward_context():
            return second_order_signal(
                model,
                batch[:2],
                batch[2:4],
                inner_steps=hparams["inner_steps"],
                inner_lr=hparams["inner_lr"],
                adapt=hparams.get("adapt"),
                seed=self.seed,
            )

    def _log(self, trainer: Trainer, found: SecondOrderSignal, *, seconds: float, share: float) -> None:
        metrics = {
            "curvature/attn_magnitude": found.attn_path.magnitude,
            "curvature/rel_diff": found.rel_diff,
            "curvature/attn_rel_diff": found.attn_rel_diff,
            "curvature/probe_seconds": seconds,
            "curvature/probe_share": share,
        }
        log_values(trainer, metrics, logging_step(trainer))
        if not found.attn_path.exists and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__}: at step {self._last_step} the attention has"
                f" {found.attn_path.magnitude:.1%} of its curvature: second order learns nothing through it"
            )
