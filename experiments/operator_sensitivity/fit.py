"""One run: `MetaSeqClassifier` under Lightning's Trainer, and the row of figures it ends in."""

import dataclasses
import gc
import logging
import math
import time
import warnings
from functools import partial

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from datamodules import SyntheticSeqCls
from experiments.operator_sensitivity.columns import COLUMNS, FAILED, NON_FINITE, OK
from experiments.operator_sensitivity.ledger import Curves
from experiments.operator_sensitivity.operator import backend_of, second_order_ok
from experiments.operator_sensitivity.probe import OperatorProbe
from experiments.operator_sensitivity.runs import Run
from lightning_modules import MetaSeqClassifier
from lightning_modules.host_memory import keep_freed_memory
from lightning_modules.step_metrics import Rows
from theria.curvature.known import versions
from theria.curvature.verdicts import one_line
from theria.t_interval import t_half_width

LAST_STEPS = 20
"""Outer steps that a final value is the mean of."""

PROBES = 5
"""Measurements of the operator's signal in a run."""

_PRESENT = 1e-8
_KEPT = (
    "loss",
    "query_accuracy",
    "grad_norm_q_proj",
    "grad_norm_k_proj",
    "grad_norm_v_proj",
    "grad_norm_head",
)


def prepare_process() -> None:
    """What a process needs once; one CPU thread, so that results do not depend on how many there are."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # the data are made on the training device, workers would only slow them down
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", category=FutureWarning)


def perform(run: Run, commit: str = "") -> tuple[dict[str, object], Curves]:
    """The row of a run, and its per-step curves; an error becomes a row with its text and no figures."""
    start = time.perf_counter()
    row = row_of(run, commit)
    curves: Curves = {}
    try:
        figures, curves = train(run)
        row |= figures
    except Exception as error:  # whatever one run does, it never stops the others
        row |= {"status": FAILED, "error": one_line(error)}
    row["wall_time_total_s"] = time.perf_counter() - start
    return row, curves


def row_of(run: Run, commit: str) -> dict[str, object]:
    """A run's row before there is anything to say of it: what it is, and of which code."""
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    return row | dataclasses.asdict(run) | {"run_id": run.run_id, "versions": versions(), "commit": commit}


def train(run: Run) -> tuple[dict[str, object], Curves]:
    """Fit one configuration and measure it.

    Raises:
        Exception: whatever the attention, the trainer or the device raises.
    """
    if run.device == "cuda":
        # a trainer and its module refer to each other: what the last run held is freed here, not in our peak
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    probe = OperatorProbe(run, max(run.outer_steps // PROBES, 1))
    with backend_of(run) as backend:
        module, rows = fit(run, backend, [probe])
    probe.note_peak()
    curves = {name: np.array([row[name] for row in rows]) for name in _KEPT}
    weight = module.model.q_proj.weight
    figures: dict[str, object] = {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "compute_dtype": "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "autocast": torch.is_autocast_enabled(run.device),
        "attn_second_order_ok": second_order_ok(run),
        "attn_second_order_path": probe.mean(probe.attn_path),
        "attn_rel_diff": probe.mean(probe.attn_rel_diff),
        "rel_diff_full_vs_fo": probe.mean(probe.rel_diff),
        "mean_outer_step_time_s": step_time(rows, probe.seconds),
        "peak_cuda_mem_bytes": probe.peak_bytes if run.device == "cuda" else "",
    }
    figures |= behaviour(curves)
    if probe.failure and not figures["error"]:
        figures["error"] = f"the probe of second order: {probe.failure}"
    return figures, curves


def fit(
    run: Run,
    backend: str,
    callbacks: list[Callback],
    *,
    max_steps: int | None = None,
    ckpt_path: str | None = None,
) -> tuple[MetaSeqClassifier, Rows]:
    """Train under Lightning; the module, and the metrics of every outer step.

    Raises:
        RuntimeError: training ended before its last step.
    """
    seed_everything(run.seed, verbose=False)
    module = MetaSeqClassifier(
        width=run.width,
        num_classes=run.num_classes,
        backend=backend,
        absorb_projections=run.absorb_projections,
        mode=run.mode,
        inner_steps=run.inner_steps,
        inner_lr=run.inner_lr,
        optimizer=partial(torch.optim.Adam, lr=run.outer_lr),
    )
    rows: Rows = []
    module.step_metrics.subscribe(rows.extend)
    data = SyntheticSeqCls(
        **dataclasses.asdict(run.spec),
        meta_batch_size=run.meta_batch,
        train_tasks_per_epoch=100 * run.meta_batch,
        seed=run.seed,
    )
    steps = run.outer_steps if max_steps is None else max_steps
    trainer = Trainer(
        accelerator=run.device,
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        limit_val_batches=0,
        # the module hands over a block of steps at a time; logging would fetch them one by one
        log_every_n_steps=10 * run.outer_steps,
        logger=False,
        enable_checkpointing=any("Checkpoint" in type(c).__name__ for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    module.step_metrics.flush()
    if trainer.global_step != steps:
        raise RuntimeError(f"training ended at outer step {trainer.global_step} of {steps}")
    return module, rows


def behaviour(curves: Curves) -> dict[str, object]:
    """What the per-step curves of a run amount to.

    final_loss, final_acc and attn_grad_norm_* are means over the last 20 outer steps, final_acc_ci95 the
    half-width of the t-interval of that mean. convergence_delta is the fall of the query loss from the first
    to the last 20 steps, in nats, and steps_to_90pct the first outer step by which 90% of that fall is done,
    in the running mean over 20 steps; empty where the loss did not fall.
    """
    loss, accuracy = curves["loss"], curves["query_accuracy"]
    last = {name: values[-LAST_STEPS:] for name, values in curves.items()}
    norms = {letter: float(last[f"grad_norm_{letter}_proj"].mean()) for letter in "qkv"}
    finite = np.isfinite(loss)
    fall = float(loss[:LAST_STEPS].mean() - loss[-LAST_STEPS:].mean())
    attention = math.hypot(*norms.values())
    broken = (
        "" if finite.all() else f"the query loss is not finite at outer step {int(np.argmin(finite)) + 1}"
    )
    return {
        "final_loss": float(last["loss"].mean()),
        "final_acc": float(last["query_accuracy"].mean()),
        "final_acc_ci95": half_width(accuracy[-LAST_STEPS:]),
        "attn_grad_present": attention > _PRESENT * float(last["grad_norm_head"].mean()),
        **{f"attn_grad_norm_{letter}": norm for letter, norm in norms.items()},
        "convergence_delta": fall,
        "steps_to_90pct": _steps_to(loss, 0.9, fall),
        "status": NON_FINITE if broken else OK,
        "error": broken,
    }


def half_width(values: NDArray[np.float64], confidence: float = 0.95) -> float:
    """Half of the t-interval of a mean; NaN for fewer than two values, or one that is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return t_half_width(float(values.std(ddof=1)), len(values), confidence)


def step_time(rows: Rows, probe_seconds: list[float]) -> float:
    """Mean wall-clock seconds of an outer step, without the first, which warms up, and without the probes."""
    seconds = [row["step_seconds"] for row in rows[1:]]
    return (sum(seconds) - sum(probe_seconds[1:])) / len(seconds) if seconds else math.nan


def _steps_to(loss: NDArray[np.float64], share: float, fall: float) -> int | str:
    if not fall > 0 or len(loss) < 2 * LAST_STEPS:
        return ""
    running = np.convolve(loss, np.ones(LAST_STEPS) / LAST_STEPS, mode="valid")
    return int(np.argmax(running <= running[0] - share * fall)) + LAST_STEPS
