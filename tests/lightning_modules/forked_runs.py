"""Runs of `theria` as forks of one process: importing torch and Lightning takes longer than a short run.

`in_forks` calls this file as a program, `python forked_runs.py DIRECTORY`, which does the runs of
DIRECTORY/runs.json one after the other. Processes of one run are told of each other as by a launcher from
outside; Lightning's own launcher is tested in tests/configs.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import warm_python
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

import datamodules.synthetic_seqcls as data
from callbacks.sharded_parameters import own_part
from lightning_modules import MemoryLM
from lightning_modules.cli import main

ROOT = Path(__file__).parents[2]
# what runs of two processes take, the second with NCCL between two devices
ACCELERATORS = [
    "cpu",
    pytest.param(
        "gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ],
    ),
]


class Run(NamedTuple):
    """One run of `theria`.

    Attributes:
        name: what it says goes to NAME.log.
        arguments: of the command line.
        processes: ranks.
        spoiled: what `spoil` takes, or None for sound tasks.
        broken: what `break_gradients` takes.
    """

    name: str
    arguments: list[str]
    processes: int = 1
    spoiled: tuple[float, list[int]] | None = None
    broken: tuple[int, ...] = ()


def in_forks(directory: Path, runs: list[Run]) -> dict[str, str]:
    """Do them; what each run said, by its name."""
    (directory / "runs.json").write_text(json.dumps(runs))
    done = warm_python.run(Path(__file__), [str(directory)])
    return said_by(directory, runs, done.returncode, done.stderr)


def in_processes(directory: Path, runs: list[Run]) -> dict[str, str]:
    """Do them, all at the same time; what each run said, by its name."""
    (directory / "runs.json").write_text(json.dumps(runs))
    processes = []
    for number, run in enumerate(runs):
        port = free_port()
        with (directory / f"{run.name}.log").open("w") as log:
            for rank in range(run.processes):
                command = [sys.executable, __file__, str(directory), str(number)]
                environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
                environment |= of_rank(run, rank, port)
                processes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment))
    end = time.monotonic() + 300
    try:
        statuses = [process.wait(max(0.0, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        statuses = [-1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return said_by(directory, runs, max(map(abs, statuses)), "")


def said_by(directory: Path, runs: list[Run], status: int, errors: str) -> dict[str, str]:
    """What the runs said, which all have ended well."""
    said = {run.name: (directory / f"{run.name}.log").read_text() for run in runs}
    assert status == 0, f"{errors}\n{said}"
    for run in runs:
        assert run.processes == 1 or f"MEMBER: {run.processes}/{run.processes}" in said[run.name]
    return said


def of_rank(run: Run, rank: int, port: int) -> dict[str, str]:
    """The environment by which a launcher tells a process where it belongs."""
    if run.processes == 1:
        return {}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    return address | {"LOCAL_RANK": str(rank)}


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


def break_gradients(batches: tuple[int, ...]) -> None:
    """Make the gradient of the last token's embedding NaN in these batches of a language model."""
    original = MemoryLM.training_step

    def training_step(self: MemoryLM, batch: Any, batch_idx: int) -> Any:
        output = original(self, batch, batch_idx)
        loader: Any = self.trainer.train_dataloader
        if loader.last_batch in batches:
            output["loss"] = output["loss"] + math.nan * self.model.embedding.weight[-1].sum()
        return output

    MemoryLM.training_step = training_step  # type: ignore[method-assign]


class OwnParts(Callback):
    """Says before the batch behind step 3 and at the end what of parameters and moments a process holds."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        moments = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
        for what, tensors in (("parameters", list(pl_module.parameters())), ("moments", moments)):
            own = sum(own_part(tensor.detach()).numel() for tensor in tensors)
            whole = sum(tensor.numel() for tensor in tensors)
            print(f"rank {trainer.global_rank} holds {own} of {whole} {what}", flush=True)


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
            os.environ |= of_rank(run, rank, port)
            rank_zero_only.rank = rank  # which Lightning has read from the environment when it was imported
        work(run)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def work(run: Run) -> None:
    """Be one process of a run."""
    if run.spoiled is not None:
        spoil(*run.spoiled)
    if run.broken:
        break_gradients(run.broken)
    sys.argv = ["theria"]
    main(run.arguments)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    runs = [Run(*each) for each in json.loads((folder / "runs.json").read_text())]
    if len(sys.argv) > 2:
        work(runs[int(sys.argv[2])])
        sys.exit()
    statuses = []
    for run in runs:
        port = free_port()
        children = [start(run, folder / f"{run.name}.log", rank, port) for rank in range(run.processes)]
        statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(statuses))
