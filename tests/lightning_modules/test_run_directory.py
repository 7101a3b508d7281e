"""Run directories are made once and found again with their newest readable checkpoint."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.run_directory import (
    Restart,
    ResumeError,
    checkpoint_files,
    config_beside,
    create_run_directory,
    find_restart,
    open_run_directory,
)


def save(run: Path, step: int, name: str | None = None) -> Path:
    path = run / "checkpoints" / (name or f"step_{step:06d}.ckpt")
    content = {"state_dict": {"weight": torch.zeros(2, 3)}, "global_step": step}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def test_versions_count_up(tmp_path: Path) -> None:
    assert [create_run_directory(tmp_path, "a").name for _ in range(3)] == [
        "version_0",
        "version_1",
        "version_2",
    ]
    (tmp_path / "a" / "version_1").rmdir()
    (tmp_path / "a" / "version_10").mkdir()
    (tmp_path / "a" / "version_old").mkdir()
    assert create_run_directory(tmp_path, "a") == tmp_path / "a" / "version_11"
    assert create_run_directory(tmp_path, "b").name == "version_0"
    assert create_run_directory(tmp_path, "a", "test").name == "test_0"


def test_no_two_processes_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "a" / "version_0"
    real = Path.mkdir

    def slower_than_another(self: Path, *args: int, **options: bool) -> None:
        if self == taken and not taken.exists():
            os.mkdir(taken)
        real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", slower_than_another)
        assert create_run_directory(tmp_path, "a").name == "version_1"
    with ThreadPoolExecutor(8) as pool:
        directories = list(pool.map(lambda _: create_run_directory(tmp_path, "b"), range(40)))
    assert len(set(directories)) == 40


def test_the_newest_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (1000000, 200, 30):
        save(tmp_path, step)
    save(tmp_path, 5, "other.ckpt")
    (tmp_path / "checkpoints" / "step_2000000.ckpt.tmp").touch()
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "step_1000000.ckpt",
        "step_000200.ckpt",
        "step_000030.ckpt",
        "other.ckpt",
    ]
    restart = find_restart(tmp_path)
    assert restart.checkpoint == tmp_path / "checkpoints" / "step_1000000.ckpt"
    assert (restart.step, restart.run, restart.in_place) == (1000000, tmp_path, True)
    assert restart.shapes == {"weight": torch.Size([2, 3])}


def test_a_truncated_one_is_skipped_with_a_warning(tmp_path: Path) -> None:
    good, bad, worse = save(tmp_path, 100), truncate(save(tmp_path, 200)), truncate(save(tmp_path, 300))
    with pytest.warns(UserWarning, match="cannot be read") as warned:
        assert find_restart(tmp_path).checkpoint == good
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    for message, path in zip(messages, (worse, bad), strict=True):
        assert str(path) in message
        assert str(good) in message


def test_a_truncated_file_named_is_an_error_that_names_the_next_good_one(tmp_path: Path) -> None:
    save(tmp_path, 100)
    good, bad = save(tmp_path, 200), truncate(save(tmp_path, 300))
    with pytest.raises(
        ResumeError, match=r"step_000300\.ckpt cannot be read.*truncated.* is .*step_000200\.ckpt"
    ):
        find_restart(bad)
    for path in checkpoint_files(tmp_path):
        if path != bad:
            truncate(path)
    with pytest.raises(ResumeError, match=r"step_000300\.ckpt cannot be read.*no other"):
        find_restart(bad)
    assert good.exists()


def test_a_file_starts_a_run_of_its_own(tmp_path: Path) -> None:
    restart = find_restart(save(tmp_path, 100))
    assert (restart.step, restart.run, restart.in_place) == (100, tmp_path, False)
    elsewhere = tmp_path / "elsewhere.ckpt"
    elsewhere.write_bytes(restart.checkpoint.read_bytes())
    assert find_restart(elsewhere).run is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such run directory or checkpoint file"),
        ("empty", r"empty is no run directory .* no checkpoints/\*\.ckpt"),
        (
            "broken",
            r"none of the checkpoints of .*broken can be read: .*step_000200\.ckpt.*step_000100\.ckpt",
        ),
        ("last", "name a run directory"),
        ("best", "name a run directory"),
        ("hpc", "name a run directory"),
    ],
)
def test_nothing_to_resume_is_an_error(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty", "checkpoints").mkdir(parents=True)
    for step in (100, 200):
        truncate(save(Path("broken"), step))
    with pytest.raises(ResumeError, match=message):
        find_restart(name)


def test_where_each_command_writes(tmp_path: Path) -> None:
    def opened(subcommand: str, ckpt_path: Path | None = None) -> str:
        restart = find_restart(ckpt_path) if ckpt_path else None
        directory = open_run_directory(subcommand, str(tmp_path), "a", restart)
        return str(directory.relative_to(tmp_path))

    assert opened("fit") == "a/version_0"
    run = tmp_path / "a" / "version_0"
    path = save(run, 100)
    for leftover in (run / "metrics.csv.tmp", run / "checkpoints" / "step_000200.ckpt.tmp"):
        leftover.touch()
    assert opened("fit", run) == "a/version_0"
    assert not list(run.rglob("*.tmp"))
    assert opened("fit", path) == "a/version_1"
    assert opened("test", run) == "a/version_0/test_0"
    assert opened("test", path) == "a/version_0/test_1"
    assert opened("validate", run) == "a/version_0/validate_0"
    assert opened("validate") == "a/validate_0"


def test_the_configuration_stands_in_the_run(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert config_beside(tmp_path) is None
    (tmp_path / "config.yaml").touch()
    assert config_beside(tmp_path) == config_beside(path) == tmp_path / "config.yaml"


def test_a_directory_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    good = save(tmp_path, 100)
    (tmp_path / "checkpoints" / "step_000200.ckpt").mkdir()
    (tmp_path / "checkpoints" / "step_000300.ckpt").symlink_to(tmp_path / "nowhere")
    assert find_restart(tmp_path).checkpoint == good


HOLD_IT = """
import sys
from pathlib import Path
from lightning_modules.run_directory import Restart, open_run_directory
run = Path(sys.argv[1])
restart = Restart(run / "a.ckpt", 0, {}, run, in_place=True)
print(open_run_directory("fit", run.parent, "x", restart), flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_trains_in_a_directory_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    run = create_run_directory(tmp_path, "x")
    restart = Restart(run / "a.ckpt", 0, {}, run, in_place=True)
    command = [sys.executable, "-c", HOLD_IT, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == f"{run}\n"
        with pytest.raises(ResumeError, match="version_0: another process is training in this run directory"):
            open_run_directory("fit", str(tmp_path), "x", restart)
        other.kill()
    assert open_run_directory("fit", str(tmp_path), "x", restart) == run
