"""A disk that is full or read-only: one clear line, and the last good checkpoint as it was."""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
import yaml

from lightning_modules.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from lightning_modules.run_directory import find_restart

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "model": {"init_args": {"width": 64, "num_classes": 2, "inner_steps": 1}},
    "data": {
        "init_args": {
            "length": 5,
            "width": 64,
            "num_classes": 2,
            "num_signal_positions": 2,
            "support_size": 3,
            "query_size": 3,
            "meta_batch_size": 2,
            "train_tasks_per_epoch": 200,
            "val_tasks": 4,
        }
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 60,
        "val_check_interval": 20,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "RNGState"},
            {"class_path": "PPLDeltaRollback", "init_args": {"every_n_steps": 10}},
            {"class_path": "MetricsJSONL"},
            {"class_path": "ResumableCheckpoint", "init_args": {"every_n_steps": 5, "keep_last": 9}},
        ],
    },
}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_may_not_grow_any_more_leaves_the_checkpoint_before_it(
    tmp_path: Path, share: float
) -> None:
    """The limit of a process on the size of files stands for the disk; every system has it."""
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    good = {"state_dict": {"weight": torch.arange(50_000.0)}}
    writer.save_checkpoint(good, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*last\.ckpt"):
            writer.save_checkpoint({"state_dict": {"weight": torch.zeros(50_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], good["state_dict"]["weight"])
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=600k", "tmpfs", str(directory)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def fit(disk: Path, configuration: Path, *more: str) -> subprocess.CompletedProcess[str]:
    configuration.write_text(yaml.safe_dump(SMALL))
    configs = ["--config", "configs/meta_seqcls.yaml", "--config", str(configuration)]
    return warm_python.run(None, ["fit", *configs, "--save_dir", str(disk), *more])


def said(run: subprocess.CompletedProcess[str]) -> str:
    """The one line of the error."""
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    (line,) = (line for line in run.stderr.splitlines() if line.startswith("theria: error: "))
    return line


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_its_last_checkpoint_is_good(
    disk: Path, tmp_path: Path
) -> None:
    run = fit(disk, tmp_path / "small.yaml")
    assert "nothing can be written any more: [Errno 28] No space left on device" in said(run)
    directory = disk / "meta_seqcls" / "version_0"
    checkpoints = sorted((directory / "checkpoints").iterdir())
    assert checkpoints
    for path in checkpoints:
        read_checkpoint(path)
    assert find_restart(directory).step >= 5
    assert f"Go on         theria fit --ckpt_path {directory}\n" in run.stdout


@pytest.mark.slow
def test_a_read_only_disk_ends_a_run_with_one_line(disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    dirpath = "--trainer.callbacks.init_args.dirpath"
    run = fit(tmp_path, tmp_path / "small.yaml", dirpath, str(disk / "checkpoints"))
    line = said(run)
    assert "nothing can be written any more: [Errno 30] Read-only file system" in line
    assert str(disk / "checkpoints") in line
