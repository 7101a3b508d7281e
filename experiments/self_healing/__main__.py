"""Let training heal itself under observation, and write what it did on one page.

    python -m experiments.self_healing --jobs 14 --out docs/results/self_healing.md
    python -m experiments.self_healing --costs-alone --device cuda --out docs/results/healing_costs_h200.md

Healthy runs (three jobs, a run a seed), runs with injected faults, and the cost of watching. Every run leaves
its figures in a file of the work directory; the same command goes on with what is missing.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.report import provenance
from experiments.self_healing.cost import measure
from experiments.self_healing.faults import FAULTS
from experiments.self_healing.jobs import COSTS_ON, JOBS
from experiments.self_healing.report import load_costs, page
from experiments.self_healing.runs import HEALTHY, Run, perform, prepare_process
from lightning_modules.atomic_file import atomic_file

LAST_FAULT = 430
"""The step by which all faults have been put in and found once."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study; None stands for the arguments of the process."""
    args = _parser().parse_args(arguments)
    runs = [] if args.costs_alone else planned(args.seeds, args.steps, args.device, args.configurations)
    args.work.mkdir(parents=True, exist_ok=True)
    prepare_process()
    costs = []
    for name in COSTS_ON[args.device] if args.cost_blocks else ():
        costs.append(args.work / f"cost-{name}-{args.device}-{args.cost_blocks}.json")
        if not costs[-1].exists():
            with atomic_file(costs[-1]) as file:
                file.write(json.dumps(measure(name, args.device, args.cost_blocks)).encode())
    execute(runs, args.work, args.jobs)
    report = page(runs, args.work, load_costs(costs), provenance("experiments.self_healing"))
    print(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report, encoding="utf-8")


def planned(seeds: Sequence[int], steps: int, device: str, jobs: Sequence[str]) -> list[Run]:
    """Healthy runs of all seeds, and every fault with the first seed."""
    healthy = [Run(job, HEALTHY, seed, steps, device) for job in jobs for seed in seeds]
    return healthy + [Run(job, fault, seeds[0], steps, device) for job in jobs for fault in FAULTS]


def execute(runs: Sequence[Run], work: Path, jobs: int) -> None:
    """Do what has no file yet, in so many processes of one thread each, the longest first."""
    missing = [run for run in runs if not (work / run.file_name).exists()]
    missing.sort(key=lambda run: (list(JOBS).index(run.job) == 1, run.fault == HEALTHY), reverse=True)
    # a process that was forked could not use CUDA, and would inherit the threads of torch
    context = multiprocessing.get_context("spawn")
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("runs", total=len(missing))
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_process) as pool:
            futures = [pool.submit(perform, run, work) for run in missing]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.advance(task)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="self_healing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=cores, help="processes; one a CPU core")
    parser.add_argument("--steps", type=int, default=1000, help=f"of every run, more than {LAST_FAULT}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--configurations", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    parser.add_argument("--cost-blocks", type=int, default=6, help="of 100 steps each; 0 measures no cost")
    parser.add_argument("--costs-alone", action="store_true", help="do no runs, and write the costs")
    parser.add_argument("--work", type=Path, default=Path("runs/self_healing"), help="files of runs")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/self_healing.md"), help="page to write"
    )
    return parser


if __name__ == "__main__":
    if not torch.cuda.is_available():
        # read when kernels are decorated, in this process and in those that it starts
        os.environ.setdefault("TRITON_INTERPRET", "1")
    main()
