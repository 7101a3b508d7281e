"""Logs of a run go on in place: no row lost, none twice."""

import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules import atomic_file
from lightning_modules.loggers import MetricsTable, RunCSVLogger, RunTensorBoardLogger


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_rows_and_columns_grow(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "run" / "metrics.csv")
    table.append({"loss": torch.tensor(0.5), "b": 1}, 0)
    table.append({"loss": 0.25}, 1)
    assert not table.path.exists()
    table.save()
    table.append({"accuracy": 1e-9}, 1)
    table.append({"loss": float("nan")}, 2)
    table.save()
    table.save()
    assert rows(table.path) == [
        {"step": "0", "loss": "0.5", "b": "1"},
        {"step": "1", "loss": "0.25"},
        {"step": "1", "accuracy": "1e-09"},
        {"step": "2", "loss": "nan"},
    ]
    assert table.path.read_text().startswith("step,accuracy,b,loss\n")


def test_numbers_are_exact(tmp_path: Path) -> None:
    value = torch.rand((), dtype=torch.float64) / 3
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append({"value": value}, 0)
    table.save()
    assert float(rows(table.path)[0]["value"]) == value.item()


def test_a_resumed_table_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    first = MetricsTable(tmp_path / "metrics.csv")
    for step in range(5):
        first.append({"loss": step}, step)
    first.append({"val": 1}, 2)
    first.save()
    resumed = MetricsTable(tmp_path / "metrics.csv", resumed_step=3)
    resumed.append({"loss": 30, "new": 1}, 3)
    resumed.save()
    assert rows(resumed.path) == [
        {"step": "0", "loss": "0"},
        {"step": "1", "loss": "1"},
        {"step": "2", "loss": "2"},
        {"step": "2", "val": "1"},
        {"step": "3", "loss": "30", "new": "1"},
    ]


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_row_cut_off_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,0.125\n1,0.625\n"[:-cut])
    MetricsTable(path, resumed_step=2)
    assert rows(path) == [{"step": "0", "loss": "0.125"}]


def test_a_kill_while_columns_are_added_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*args: Any) -> None:
        raise Killed

    table = MetricsTable(tmp_path / "metrics.csv")
    table.append({"loss": 1}, 0)
    table.save()
    table.append({"val": 1}, 0)
    monkeypatch.setattr(atomic_file.os, "replace", kill)
    with pytest.raises(Killed):
        table.save()
    assert rows(table.path) == [{"step": "0", "loss": "1"}]


def test_csv_logger_writes_what_lightning_logs(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path / "runs" / "name" / "version_3"))
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 1.0}, step=4)
    logger.log_metrics({"extra": 2.0})
    logger.finalize("success")
    path = Path(logger.log_dir) / "metrics.csv"
    assert rows(path) == [{"step": "4", "loss": "1.0"}, {"step": "4", "extra": "2.0"}]
    assert (logger.name, logger.version) == ("name", 3)
    assert (logger.save_dir, logger.root_dir) == (str(tmp_path / "runs"), str(tmp_path / "runs" / "name"))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", [RunCSVLogger, RunTensorBoardLogger])
def test_a_logger_without_a_directory_says_so(kind: type[RunCSVLogger | RunTensorBoardLogger]) -> None:
    logger = kind()
    with pytest.raises(RuntimeError, match="no directory yet"):
        _ = logger.log_dir
    logger.bind(Path("a", "b", "test_0"))
    assert (logger.log_dir, logger.version) == ("a/b/test_0", "test_0")


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path) -> None:
    def log(steps: range, scale: float, resumed_step: int | None = None) -> None:
        logger = RunTensorBoardLogger()
        logger.bind(tmp_path / "name" / "version_0", resumed_step)
        for step in steps:
            logger.log_metrics({"loss": scale * step}, step)
        logger.finalize("success")

    log(range(6), 1.0)
    # files are read in the order of their names, which begin with the second they were opened in
    time.sleep(1.05)
    log(range(4, 8), 10.0, resumed_step=4)
    expected = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]
    events = EventAccumulator(str(tmp_path / "name" / "version_0"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    assert "hp_metric" not in events.Tags()["scalars"]
    # what the server reads, which takes a first start for the run's own
    served = plugin_event_accumulator.EventAccumulator(str(tmp_path / "name" / "version_0"))
    served.Reload()
    values = [(event.step, event.tensor_proto.float_val[0]) for event in served.Tensors("loss")]
    assert values == expected
