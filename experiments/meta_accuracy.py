"""Accuracy of second- and first-order MAML on the frozen study, and on held-out tasks after a long run.

    python -m experiments.meta_accuracy --out docs/results/meta_accuracy.md

Every run is one Lightning fit of `MetaSeqClassifier`; the configuration is that of the operator study
(16 tasks a meta-batch, inner rate 0.4, Adam 1e-3).
"""

import argparse
import itertools
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from rich.progress import track

from benchmarks.report import markdown_table, provenance
from datamodules import SyntheticSeqCls
from lightning_modules import MetaSeqClassifier
from lightning_modules.host_memory import keep_freed_memory
from lightning_modules.step_metrics import Rows

LAST_STEPS = 20


@dataclass(frozen=True)
class Run:
    """One cell of the tables."""

    mode: str
    inner_steps: int
    seed: int
    outer_steps: int


@dataclass(frozen=True)
class Score:
    """What a run reached."""

    final_accuracy: float
    test_accuracy: float
    test_ci95: float


def train(run: Run, *, device: str, absorb_projections: bool, test: bool) -> Score:
    """Fit one configuration; the final accuracy is the mean over the last 20 outer steps."""
    seed_everything(run.seed, verbose=False)
    module = MetaSeqClassifier(
        backend="reference", absorb_projections=absorb_projections, mode=run.mode, inner_steps=run.inner_steps
    )
    rows: Rows = []
    module.step_metrics.subscribe(rows.extend)
    trainer = Trainer(
        accelerator="cuda" if device == "cuda" else "cpu",
        devices=1,
        max_steps=run.outer_steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        use_distributed_sampler=False,
    )
    data = SyntheticSeqCls(seed=run.seed)
    if run.outer_steps:
        trainer.fit(module, datamodule=data)
        module.step_metrics.flush()
    final = [row["query_accuracy"] for row in rows[-LAST_STEPS:]]
    held_out = trainer.test(module, datamodule=data, verbose=False)[0] if test else {}
    return Score(
        final_accuracy=statistics.fmean(final) if final else float("nan"),
        test_accuracy=held_out.get("test/query_accuracy", float("nan")),
        test_ci95=held_out.get("test/query_accuracy_ci95", float("nan")),
    )


def main() -> None:
    """Run the grid and the long confirmation, print both tables and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--long-inner-steps", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--outer-steps", type=int, default=500)
    parser.add_argument("--long-outer-steps", type=int, default=1000)
    parser.add_argument("--absorb-projections", action="store_true", help="the faster form of the same model")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options = {"device": args.device, "absorb_projections": args.absorb_projections}
    modes = ("FULL", "FO")
    grid = [
        Run(m, k, s, args.outer_steps) for m, k, s in itertools.product(modes, args.inner_steps, args.seeds)
    ]
    long = [
        Run(m, k, s, args.long_outer_steps)
        for m, k, s in itertools.product(modes, args.long_inner_steps, args.seeds)
    ]
    untrained = [Run("FULL", k, s, 0) for k, s in itertools.product(args.long_inner_steps, args.seeds)]
    scores = {run: train(run, test=False, **options) for run in track(grid, "grid")}
    tested = {run: train(run, test=True, **options) for run in track([*untrained, *long], "long run")}
    report = "\n".join(
        [
            "# Accuracy of MAML through attention",
            "",
            provenance("experiments.meta_accuracy"),
            f"## Query accuracy after {args.outer_steps} outer steps (mean of the last {LAST_STEPS})",
            "",
            *_grid_table(scores, args.seeds),
            "",
            f"## 640 held-out test tasks after {args.long_outer_steps} outer steps",
            "",
            "Mean over tasks with the half-width of its 95% interval.",
            "",
            *_test_table(tested, args.seeds),
            "",
        ]
    )
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")


def _grid_table(scores: dict[Run, Score], seeds: list[int]) -> list[str]:
    rows = []
    for mode, steps in dict.fromkeys((run.mode, run.inner_steps) for run in scores):
        values = [s.final_accuracy for r, s in scores.items() if (r.mode, r.inner_steps) == (mode, steps)]
        rows.append([mode, str(steps), *(f"{v:.4f}" for v in values), f"{statistics.fmean(values):.4f}"])
    return markdown_table(["mode", "inner steps", *(f"seed {s}" for s in seeds), "mean"], rows)


def _test_table(scores: dict[Run, Score], seeds: list[int]) -> list[str]:
    rows = []
    for mode, steps, outer in dict.fromkeys((r.mode, r.inner_steps, r.outer_steps) for r in scores):
        found = [
            s for r, s in scores.items() if (r.mode, r.inner_steps, r.outer_steps) == (mode, steps, outer)
        ]
        cells = [f"{s.test_accuracy:.4f} ± {s.test_ci95:.4f}" for s in found]
        mean = statistics.fmean(s.test_accuracy for s in found)
        rows.append([mode if outer else "untrained", str(steps), *cells, f"{mean:.4f}"])
    return markdown_table(["mode", "inner steps", *(f"seed {s}" for s in seeds), "mean"], rows)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
