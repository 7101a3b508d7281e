"""Milliseconds an outer step of ``theria fit``, end to end: data, meta-gradient, optimiser and logging.

    python -m benchmarks.meta_fit --accelerator gpu --out docs/results/meta_fit_h200.md

Steps are timed by the run itself (``perf/step_seconds``, wall clock from step to step). The first hundred, in
which it captures and warms up, are left out, and so is validation.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.report import markdown_table, provenance
from callbacks import read_metrics
from lightning_modules.cli import main as theria

WARMUP_STEPS = 100


def milliseconds_a_step(
    accelerator: str, inner_steps: int, mode: str, absorb: bool, steps: int
) -> list[float]:
    """Wall-clock milliseconds of every step after the warm-up."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = {
            "config": "configs/meta_seqcls.yaml",
            "save_dir": directory,
            "model.init_args.inner_steps": inner_steps,
            "model.init_args.mode": mode,
            "model.init_args.absorb_projections": str(absorb).lower(),
            "trainer.accelerator": accelerator,
            "trainer.max_steps": WARMUP_STEPS + steps,
            "trainer.val_check_interval": WARMUP_STEPS + steps,
            "trainer.limit_val_batches": 1,
        }
        theria(["fit", *(f"--{name}={value}" for name, value in arguments.items())])
        (path,) = Path(directory).glob("**/metrics.jsonl")
        seconds = read_metrics(path)["step_seconds"]
    return [1e3 * value for value in seconds[WARMUP_STEPS:]]


def main() -> None:
    """Fit every configuration, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--modes", nargs="+", default=["FULL", "FO"])
    parser.add_argument("--steps", type=int, default=400, help="steps that are timed")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    rows = []
    for absorb in (False, True):
        for mode in args.modes:
            for inner_steps in args.inner_steps:
                times = milliseconds_a_step(args.accelerator, inner_steps, mode, absorb, args.steps)
                numbers = (statistics.fmean(times), statistics.median(times))
                rows.append(
                    [str(absorb).lower(), mode, str(inner_steps), *(f"{value:.2f}" for value in numbers)]
                )
    header = ["absorb_projections", "mode", "inner steps", "mean ms a step", "median ms a step"]
    lines = [
        "# `theria fit`, end to end",
        "",
        provenance("benchmarks.meta_fit"),
        *markdown_table(header, rows),
        "",
    ]
    report = "\n".join(lines)
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
