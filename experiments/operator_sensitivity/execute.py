"""Doing a list of runs: those that are not done yet, over several processes, with an estimate of the end."""

import os
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.operator_sensitivity.columns import OK
from experiments.operator_sensitivity.fit import perform, prepare_process
from experiments.operator_sensitivity.ledger import Ledger
from experiments.operator_sensitivity.runs import Run, costliest_first
from experiments.operator_sensitivity.worker import Outcome, Worker


def execute(
    runs: Sequence[Run], ledger: Ledger, *, jobs: int = 1, retry_failed: bool = False, title: str = "runs"
) -> int:
    """Do every run that has no row yet and write its row as soon as it ends; the number of runs done.

    Interrupted at any moment, the same call goes on with what is missing. A process that is killed costs
    the run it was doing, whose row says so, and nothing else.

    Args:
        runs: what shall have a row in the end.
        ledger: where the rows are; rows of other shards count as done.
        jobs: processes; 0 for one a CPU core, or one for a GPU, whose runs would share it.
        retry_failed: do runs again whose row says that they failed.
        title: of the progress bar.

    Raises:
        ValueError: if runs are missing whose device is not there.
    """
    done = ledger.finished(failed_too=not retry_failed)
    missing = [run for run in runs if run.run_id not in done]
    if not missing:
        return 0
    if missing[0].device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: {len(missing)} runs are to be done, and there is no CUDA device")
    jobs = jobs or (1 if missing[0].device == "cuda" else len(os.sched_getaffinity(0)))
    commit = current_commit()
    with _bar() as bar:
        task = bar.add_task(title, total=sum(run.cost for run in missing), done=0, of=len(missing))
        finished = _here(missing, commit) if jobs == 1 else _in_processes(missing, commit, jobs)
        for count, (run, row, curves) in enumerate(finished, start=1):
            if curves:
                ledger.write_curves(run, curves)
            ledger.append(row)
            bar.update(task, advance=run.cost, done=count)
            if row["status"] != OK:
                bar.console.print(
                    f"{run.backend} {run.variant} {run.mode} k={run.inner_steps} seed {run.seed}:"
                    f" {row['status']}, {row['error']}",
                    markup=False,
                )
    return len(missing)


def current_commit() -> str:
    """The commit of this code, with a + if files differ from it; "unknown" outside of a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _here(runs: Sequence[Run], commit: str) -> Iterator[Outcome]:
    prepare_process()
    for run in runs:
        yield run, *perform(run, commit)


def _in_processes(runs: Sequence[Run], commit: str, jobs: int) -> Iterator[Outcome]:
    with ExitStack() as stack:
        waiting = deque(costliest_first(runs))
        busy: dict[Connection, Worker] = {}

        def occupy(worker: Worker | None) -> None:
            if waiting:
                worker = worker or stack.enter_context(Worker(commit))
                worker.start(waiting.popleft())
                busy[worker.connection] = worker

        for _ in range(jobs):
            occupy(None)
        while busy:
            for connection in wait(list(busy)):
                worker = busy.pop(connection)  # type: ignore[call-overload]  # wait is typed for sockets too
                outcome = worker.outcome()
                # the next run is on its way before this one's row is written
                occupy(worker if worker.process.is_alive() else None)
                yield outcome


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description} {task.fields[done]}/{task.fields[of]}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}% of the work"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        # the mean speed of the last runs; a run may take minutes
        speed_estimate_period=3600,
    )
