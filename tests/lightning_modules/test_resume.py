"""A run that kill -9 stops, resumed by naming its directory, equals the uninterrupted one exactly."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import warm_python
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import read_metrics
from lightning_modules.checkpoint_io import read_checkpoint

HERE = Path(__file__).parent
MAIN_CONFIG = HERE.parents[1] / "configs" / "meta_seqcls.yaml"
LAST_STEP = 14
SMALL: dict[str, Any] = {
    "model": {"init_args": {"width": 6, "num_classes": 2, "inner_steps": 1}},
    "data": {
        "init_args": {
            "length": 5,
            "width": 6,
            "num_classes": 2,
            "num_signal_positions": 2,
            "support_size": 3,
            "query_size": 3,
            "meta_batch_size": 2,
            "train_tasks_per_epoch": 14,
            "val_tasks": 6,
        }
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": LAST_STEP,
        "val_check_interval": 4,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "RNGState"},
            {"class_path": "AttentionGradLogger", "init_args": {"every_n_steps": 2}},
            {"class_path": "MetricsJSONL"},
            {"class_path": "ResumableCheckpoint", "init_args": {"every_n_steps": 3, "keep_last": 2}},
        ],
    },
}
KILLS = [
    "after a batch",
    "before a batch",
    "before the optimiser's step",
    "before a validation's first batch",
    "inside a validation",
    "after a validation, before its checkpoint",
    "with half a checkpoint written",
    "with half a checkpoint of a validated step written",
    "before a checkpoint gets its name",
    "after a checkpoint got its name",
    "right after a checkpoint",
    "at an epoch's end",
    "at an epoch's start",
    "in the middle of a metrics record",
    "while metrics.csv gets columns",
    "three times",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all runs, made by one process that forks them."""
    directory = tmp_path_factory.mktemp("runs")
    (directory / "small.yaml").write_text(yaml.safe_dump(SMALL))
    configs = [str(MAIN_CONFIG), str(directory / "small.yaml")]
    done = warm_python.run(HERE / "killed_runs.py", [str(directory), "all", *configs])
    assert done.returncode == 0, done.stderr
    return directory


def outcome(runs: Path, name: str) -> Path:
    return runs / name.replace(" ", "_")


def run_directory(runs: Path, name: str) -> Path:
    return outcome(runs, name) / "runs" / "meta_seqcls" / "version_0"


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two nested contents of checkpoints differ, bit for bit."""
    if type(first) is not type(second):
        return [where]
    if isinstance(first, Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [where]
    if isinstance(first, dict):
        found = [f"{where}[{key!r}]" for key in first.keys() ^ second.keys()]
        for key in first.keys() & second.keys():
            found += differences(first[key], second[key], f"{where}[{key!r}]")
        return found
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [where]
        return [
            difference
            for index, pair in enumerate(zip(first, second, strict=True))
            for difference in differences(*pair, f"{where}[{index}]")
        ]
    return [] if first == second else [where]


def final_checkpoint(runs: Path, name: str) -> dict[str, Any]:
    checkpoint = read_checkpoint(run_directory(runs, name) / "checkpoints" / f"step_{LAST_STEP:06d}.ckpt")
    # the clock's reading of the last step
    checkpoint["callback_metrics"].pop("perf/step_seconds", None)
    return checkpoint


def tasks_of_steps(runs: Path, name: str) -> dict[int, Any]:
    tasks: dict[int, Any] = {}
    for line in (outcome(runs, name) / "tasks.jsonl").read_text().splitlines():
        step, ids = json.loads(line)
        assert tasks.setdefault(step, ids) == ids, f"step {step} was trained on other tasks the second time"
    return tasks


def metrics(runs: Path, name: str, kind: str) -> pd.DataFrame:
    table = read_metrics(run_directory(runs, name) / "metrics.jsonl", kind)
    return table.drop(columns=["attempt", "timestamp", "step_seconds"], errors="ignore")


def csv_rows(runs: Path, name: str) -> list[dict[str, str]]:
    with (run_directory(runs, name) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({len(row) for row in rows}) == 1
    return [
        {column: value for column, value in row.items() if value and not column.startswith("perf/")}
        for row in rows
    ]


def shown_by_tensorboard(runs: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_directory(runs, name)), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("perf/")
    }


def test_the_uninterrupted_run_is_as_meant(runs: Path) -> None:
    assert json.loads((outcome(runs, "whole") / "statuses.json").read_text()) == [0]
    assert sorted(tasks_of_steps(runs, "whole")) == list(range(1, LAST_STEP + 1))
    assert len(metrics(runs, "whole", "train")) == LAST_STEP
    assert metrics(runs, "whole", "validation")["step"].tolist() == [4, 8, 12]
    validated = [int(row["step"]) for row in csv_rows(runs, "whole") if "val/query_accuracy" in row]
    assert validated == [3, 7, 11]


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_as_the_uninterrupted_one(runs: Path, name: str) -> None:
    statuses = json.loads((outcome(runs, name) / "statuses.json").read_text())
    log = (outcome(runs, name) / "log.txt").read_text()
    assert statuses == [*[-9] * (len(statuses) - 1), 0], log
    assert len(statuses) == (4 if name == "three times" else 2)
    assert "cannot be read" not in log  # no half of a checkpoint ever stood under its name

    assert not differences(final_checkpoint(runs, "whole"), final_checkpoint(runs, name))
    assert tasks_of_steps(runs, name) == tasks_of_steps(runs, "whole")
    for kind in ("train", "validation"):
        pd.testing.assert_frame_equal(
            metrics(runs, name, kind), metrics(runs, "whole", kind), check_exact=True, check_like=True
        )
    assert csv_rows(runs, name) == csv_rows(runs, "whole")
    assert shown_by_tensorboard(runs, name) == shown_by_tensorboard(runs, "whole")


@pytest.mark.parametrize("name", ["whole", *KILLS])
def test_no_file_is_left_over(runs: Path, name: str) -> None:
    run = run_directory(runs, name)
    assert not list(run.rglob("*.tmp"))
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert steps == ["step_000012.ckpt", "step_000014.ckpt"]
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
