"""Run directories: `<save_dir>/<name>/version_N`, made once, and found again with their newest checkpoint."""

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from callbacks.resumable_checkpoint import CHECKPOINT_NAME
from lightning_modules.atomic_file import remove_leftovers
from lightning_modules.checkpoint_io import UnreadableCheckpointError, read_checkpoint

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK_NAME = ".lock"
METRICS = ("metrics.csv", "metrics.jsonl")
# Lightning's own, of which "last" starts from scratch without a word where it finds nothing.
_KEYWORDS = ("last", "best", "hpc")


class ResumeError(ValueError):
    """Nothing can be resumed from what was named."""


@dataclass(frozen=True)
class Restart:
    """A checkpoint to start from.

    Attributes:
        checkpoint: its file.
        step: optimiser steps behind it.
        shapes: of the tensors of its model.
        run: the run directory it stands in, if it stands in one.
        in_place: whether that directory was named, so that training goes on in it; a file starts a new run.
    """

    checkpoint: Path
    step: int
    shapes: dict[str, torch.Size]
    run: Path | None
    in_place: bool


def create_run_directory(save_dir: str | Path, name: str, prefix: str = "version") -> Path:
    """Make the first `<save_dir>/<name>/<prefix>_N` that is not there; no two processes get the same."""
    parent = Path(save_dir) / name
    parent.mkdir(parents=True, exist_ok=True)
    taken = [
        int(number)
        for path in parent.glob(f"{prefix}_*")
        if (number := path.name[len(prefix) + 1 :]).isdigit()
    ]
    version = max(taken, default=-1) + 1
    while True:
        directory = parent / f"{prefix}_{version}"
        try:
            directory.mkdir()
        except FileExistsError:
            version += 1
        else:
            return directory


def open_run_directory(subcommand: str, save_dir: str, name: str, restart: Restart | None) -> Path:
    """The directory to write into: of the resumed run, of a new one, or a new one for an evaluation.

    An evaluation of a run's checkpoint gets `test_N` or `validate_N` inside that run's directory.

    Raises:
        ResumeError: another process is training in the directory.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        # Only rank zero writes, and the trainer tells its directory to whoever asks.
        return Path(save_dir, name)
    if subcommand == "fit":
        if restart is not None and restart.in_place and restart.run is not None:
            _hold(restart.run)
            remove_leftovers(restart.run)
            remove_leftovers(restart.run / CHECKPOINTS)
            return restart.run
        return _hold(create_run_directory(save_dir, name))
    if restart is not None and restart.run is not None:
        return create_run_directory(restart.run.parent, restart.run.name, subcommand)
    return create_run_directory(save_dir, name, subcommand)


_held: list[IO[str]] = []
"""Open files of locks: the system gives a lock back when its process ends, however it ends."""


def _hold(run: Path) -> Path:
    """Keep other processes from training in a directory for as long as this one lives."""
    lock = (run / LOCK_NAME).open("a", encoding="utf-8")
    try:
        # not flock, which data-loading workers would inherit and keep past a kill
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise ResumeError(f"{run}: another process is training in this run directory") from error
    _held.append(lock)
    return run


def find_restart(ckpt_path: str | Path) -> Restart:
    """What `--ckpt_path` names: the newest readable checkpoint of a run directory, or a checkpoint file.

    Warns of each newer checkpoint of a run directory that cannot be read.

    Raises:
        ResumeError: there is no such path, it is one of Lightning's keywords, or it cannot be read; the
            message names what can.
    """
    path = Path(ckpt_path)
    if path.is_dir():
        return _newest(path)
    if path.is_file():
        return _named(path)
    if str(ckpt_path) in _KEYWORDS:
        raise ResumeError(
            f"--ckpt_path {ckpt_path}: name a run directory, for its newest checkpoint, or a checkpoint file"
        )
    raise ResumeError(f"--ckpt_path {path}: there is no such run directory or checkpoint file")


def checkpoint_files(run: Path) -> list[Path]:
    """The checkpoint files of a run directory, the newest first."""

    def age(path: Path) -> tuple[int, float]:
        # A file's time does not survive every copy of the directory, its step does.
        match = CHECKPOINT_NAME.fullmatch(path.name)
        return (int(match[1]), 0.0) if match else (-1, path.stat().st_mtime)

    files = (path for path in (run / CHECKPOINTS).glob("*.ckpt") if path.is_file())
    return sorted(files, key=age, reverse=True)


def config_beside(ckpt_path: str | Path) -> Path | None:
    """The configuration of the run directory that `--ckpt_path` names, or names a checkpoint in."""
    path = Path(ckpt_path)
    run = path if path.is_dir() else path.parent.parent
    config = run / CONFIG_NAME
    return config if config.is_file() else None


def _newest(run: Path) -> Restart:
    files = checkpoint_files(run)
    if not files:
        raise ResumeError(
            f"{run} is no run directory that can be resumed: there is no {CHECKPOINTS}/*.ckpt in it"
        )
    unreadable: list[UnreadableCheckpointError] = []
    for path in files:
        try:
            checkpoint = read_checkpoint(path)
        except UnreadableCheckpointError as error:
            unreadable.append(error)
            continue
        for skipped in unreadable:
            rank_zero_warn(f"{skipped}; going on from {path} instead")
        return _restart(path, checkpoint, in_place=True)
    raise ResumeError(f"none of the checkpoints of {run} can be read: {'; '.join(map(str, unreadable))}")


def _named(path: Path) -> Restart:
    try:
        return _restart(path, read_checkpoint(path), in_place=False)
    except UnreadableCheckpointError as error:
        for other in checkpoint_files(path.parent.parent):
            if other != path and _is_readable(other):
                raise ResumeError(f"{error}; the newest that can be is {other}") from error
        raise ResumeError(f"{error}; no other beside it can be either") from error


def _is_readable(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except UnreadableCheckpointError:
        return False
    return True


def _restart(path: Path, checkpoint: dict[str, Any], *, in_place: bool) -> Restart:
    shapes = {
        name: value.shape
        for name, value in checkpoint["state_dict"].items()
        if isinstance(value, torch.Tensor)
    }
    run = path.parent.parent if path.parent.name == CHECKPOINTS else None
    return Restart(path, int(checkpoint.get("global_step", 0)), shapes, run, in_place)
