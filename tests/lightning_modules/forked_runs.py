"""Runs of `theria` as forks of one process: importing torch and Lightning takes longer than a short run.

`in_forks` calls this file as a program, `python forked_runs.py DIRECTORY`, which does the runs of
DIRECTORY/runs.json one after the other. Processes of one run are told of each other as by a launcher from
outside; Lightning's own launcher is tested in tests/configs and tests/callbacks/test_niah_probe.py.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only

import datamodules.synthetic_seqcls as data
from lightning_modules.cli import main

ROOT = Path(__file__).parents[2]


class Run(NamedTuple):
    """One run of `theria`.

    Attributes:
        name: what it says goes to NAME.log.
        arguments: of the command line.
        processes: ranks.
        spoiled: what `spoil` takes, or None for sound tasks.
    """

    name: str
    arguments: list[str]
    processes: int = 1
    spoiled: tuple[float, list[int]] | None = None


def in_forks(directory: Path, runs: list[Run]) -> dict[str, str]:
    """Do them; what each run said, by its name."""
    (directory / "runs.json").write_text(json.dumps(runs))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(directory)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    said = {run.name: (directory / f"{run.name}.log").read_text() for run in runs}
    assert done.returncode == 0, f"{done.stderr}\n{said}"
    for name, _, processes, _ in runs:
        assert processes == 1 or f"MEMBER: {processes}/{processes}" in said[name]
    return said


def spoil(factor: float, broken: list[int]) -> None:
    """Multiply the query inputs of these tasks of epoch 0, whichever process makes them."""
    original = data.make_tasks

    def make_tasks(spec: Any, seed: int, request: Any) -> Any:
        tasks = original(spec, seed, request)
        bad = torch.isin(request.task_ids, torch.tensor(broken)) & (request.epoch == 0)
        if request.stream == "train" and bool(bad.any()):
            tasks.query_x[bad] *= factor
        return tasks

    data.make_tasks = make_tasks


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(run: Run, log: Path, rank: int, port: int) -> int:
    """Fork one process of a run; its id."""
    child = os.fork()
    if child:
        return child
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        if run.processes > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
            os.environ |= address | {"LOCAL_RANK": str(rank)}
            rank_zero_only.rank = rank  # which Lightning has read from the environment when it was imported
        if run.spoiled is not None:
            spoil(*run.spoiled)
        sys.argv = ["theria"]
        main(run.arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    statuses = []
    for run in (Run(*each) for each in json.loads((folder / "runs.json").read_text())):
        port = free_port()
        children = [start(run, folder / f"{run.name}.log", rank, port) for rank in range(run.processes)]
        statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(statuses))
