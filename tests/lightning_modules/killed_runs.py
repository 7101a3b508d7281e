"""Runs `theria fit` in children that kill themselves with SIGKILL at chosen points, and resumes them.

Called as `python killed_runs.py DIRECTORY KILLS CONFIG...`, KILLS naming some of those below with commas
between them, or all of them. Torch and Lightning are imported once; every run is a
fork of this process, made while it has no threads. A run leaves its files in DIRECTORY/<name>, with the
tasks or the sequences of every training step in `tasks.jsonl` beside them.
"""

import functools
import gc
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # before the forks that use it

import datamodules.synthetic_seqcls as data
from callbacks import ResumableCheckpoint, RNGState
from callbacks.metrics_file import MetricsFile
from datamodules.packing import TextBatch
from lightning_modules.cli import main

Install = Callable[[], None]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def replace(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def at(hook: str, step: int) -> Install:
    """In a callback hook, after so many optimiser steps."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, trainer: Any, *args: Any) -> Any:
            if trainer.global_step == step and not trainer.sanity_checking:
                kill()
            return original(self, trainer, *args)

        return hooked

    return lambda: replace(RNGState, hook, make)


def while_writing_checkpoint(number: int) -> Install:
    """With half of a checkpoint written."""
    calls = [0]

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def save(content: Any, file: Any) -> None:
            calls[0] += 1
            if calls[0] == number:
                whole = io.BytesIO()
                original(content, whole)
                file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
                file.flush()
                kill()
            original(content, file)

        return save

    return lambda: replace(torch, "save", make)


def around_replacing(target: str, *, before: bool, number: int = 1) -> Install:
    """Before or after a complete temporary file takes the place of `target`."""
    calls = [0]

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def os_replace(source: Any, destination: Any) -> None:
            calls[0] += Path(destination).name == target
            now = Path(destination).name == target and calls[0] == number
            if now and before:
                kill()
            original(source, destination)
            if now:
                kill()

        return os_replace

    return lambda: replace(os, "replace", make)


def right_after_checkpoint(step: int) -> Install:
    """With a new checkpoint written and no old one removed yet."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def remove_old(self: Any, trainer: Any, saved: int) -> None:
            if saved == step:
                kill()
            original(self, trainer, saved)

        return remove_old

    return lambda: replace(ResumableCheckpoint, "_remove_old", make)


def while_writing_metrics(number: int) -> Install:
    """In the middle of a line of metrics.jsonl."""
    calls = [0]

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: Any, block: bytes) -> None:
            calls[0] += 1
            if calls[0] == number:
                original(self, block[: len(block) // 2])
                kill()
            original(self, block)

        return write

    return lambda: replace(MetricsFile, "_write", make)


def nothing() -> None:
    """Let the run end by itself."""


# Epochs have 7 steps; checkpoints come after 3, 6, 9, 12 and 14 of them, validations of 3 batches after 4, 8
# and 12.
KILLS: dict[str, list[Install]] = {
    "whole": [nothing],
    "after a batch": [at("on_train_batch_end", 5)],
    "before a batch": [at("on_train_batch_start", 7)],
    "before the optimiser's step": [at("on_before_optimizer_step", 10)],
    "before a validation's first batch": [at("on_validation_start", 4)],
    "inside a validation": [at("on_validation_batch_end", 8)],
    "after a validation, before its checkpoint": [at("on_validation_end", 12)],
    "with half a checkpoint written": [while_writing_checkpoint(2)],
    "with half a checkpoint of a validated step written": [while_writing_checkpoint(4)],
    "before a checkpoint gets its name": [around_replacing("step_000009.ckpt", before=True)],
    "after a checkpoint got its name": [around_replacing("step_000006.ckpt", before=False)],
    "right after a checkpoint": [right_after_checkpoint(9)],
    "at an epoch's end": [at("on_train_epoch_end", 7)],
    "at an epoch's start": [at("on_train_epoch_start", 7)],
    "in the middle of a metrics record": [while_writing_metrics(5)],
    "while metrics.csv gets columns": [around_replacing("metrics.csv", before=True, number=2)],
    "three times": [
        at("on_train_batch_end", 5),
        at("on_validation_batch_end", 8),
        around_replacing("step_000012.ckpt", before=True),
    ],
}


def record_tasks() -> None:
    """Write the ids of every training batch to tasks.jsonl, with the number of its step."""
    asked: dict[str, Any] = {}

    def make_tasks(original: Callable[..., Any]) -> Callable[..., Any]:
        def make(spec: Any, seed: int, request: Any) -> Any:
            asked[request.stream] = [int(request.epoch), request.task_ids.tolist()]
            return original(spec, seed, request)

        return make

    def batch_end(original: Callable[..., Any]) -> Callable[..., Any]:
        def on_train_batch_end(self: Any, trainer: Any, *args: Any) -> None:
            batch = args[2]
            if isinstance(batch, TextBatch):
                asked["train"] = [batch.sample_ids.tolist(), batch.tokens.tolist()]
            with Path("tasks.jsonl").open("a") as file:
                file.write(json.dumps([trainer.global_step, asked["train"]]) + "\n")
            original(self, trainer, *args)

        return on_train_batch_end

    replace(data, "make_tasks", make_tasks)
    replace(RNGState, "on_train_batch_end", batch_end)


def run(directory: Path, args: list[str], install: Install) -> int:
    """Fork a run; the status of how it ended, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.chdir(directory)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        sys.argv = ["theria"]
        record_tasks()
        install()
        main(args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_and_resume(directory: Path, configs: list[str], kills: list[Install]) -> None:
    directory.mkdir()
    start = ["fit", *(part for config in configs for part in ("--config", config))]
    statuses = [run(directory, start, kills[0])]
    for install in [*kills[1:], *([] if kills == [nothing] else [nothing])]:
        (written,) = directory.glob("runs/*/version_0")
        resume = ["fit", "--ckpt_path", str(written.relative_to(directory))]
        statuses.append(run(directory, resume, install))
    (directory / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    root, chosen, *given = sys.argv[1:]
    every = list(KILLS) if chosen == "all" else chosen.split(",")
    # what forks would each touch or import
    gc.freeze()
    lanes = [every[lane::2] for lane in range(2)]
    pids = []
    for names in lanes:
        pid = os.fork()
        if pid == 0:
            for name in names:
                run_and_resume(Path(root, name.replace(" ", "_")), given, KILLS[name])
            os._exit(0)
        pids.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
