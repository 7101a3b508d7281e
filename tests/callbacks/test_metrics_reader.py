import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import callbacks.metrics_file
from callbacks.metrics_file import MetricsFile
from callbacks.metrics_reader import CorruptMetricsError, read_metrics

WRITER = """
import importlib.util, os, signal, sys

source, path, checkpoint = sys.argv[1:4]
first, cut = map(int, sys.argv[4:])
spec = importlib.util.spec_from_file_location("metrics_file", source)
metrics_file = importlib.util.module_from_spec(spec)
spec.loader.exec_module(metrics_file)

def die_in_the_middle(self, block):
    self._file.write(block[:cut])
    self._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

file = metrics_file.MetricsFile(metrics_file.Path(path), step=first - 1)
for block in range(10**6):
    if cut >= 0 and block == 2:
        metrics_file.MetricsFile._write = die_in_the_middle
    steps = range(first + 50 * block, first + 50 * (block + 1))
    rows = [{"step": step, "loss": 1 / step, "attempt_of": file.attempt} for step in steps]
    file.append("train", [(0.0, row) for row in rows])
    if block % 3 == 0:
        file.sync()
        with open(checkpoint + ".new", "w") as out:
            out.write(str(steps[-1]))
        os.replace(checkpoint + ".new", checkpoint)
"""


def write_attempt(path: Path, after: int, steps: range, kind: str = "train") -> None:
    file = MetricsFile(path, step=after)
    file.append(kind, [(100.0 * file.attempt + step, {"step": step, "loss": step / 8}) for step in steps])
    file.close()


def test_of_every_step_the_last_attempt_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, 0, range(1, 11))
    write_attempt(path, 6, range(7, 9))
    write_attempt(path, 4, range(5, 8))
    expected = pd.DataFrame(
        {
            "step": range(1, 11),
            "attempt": [1, 1, 1, 1, 3, 3, 3, 2, 1, 1],
            "timestamp": [101.0, 102, 103, 104, 305, 306, 307, 208, 109, 110],
            "loss": [step / 8 for step in range(1, 11)],
        }
    )
    pd.testing.assert_frame_equal(read_metrics(path), expected)


def test_steps_are_in_order_whatever_the_order_of_attempts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, 6, range(7, 9))
    write_attempt(path, 0, range(1, 7))
    table = read_metrics(path)
    assert list(table["step"]) == list(range(1, 9))
    assert list(table["attempt"]) == [2] * 6 + [1] * 2


def test_validation_is_a_table_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    file.append("train", [(0.0, {"step": step, "loss": 1.0}) for step in (1, 2, 3)])
    file.append("validation", [(0.0, {"step": 3, "val/accuracy": 0.5})])
    file.append("train", [(0.0, {"step": 4, "loss": 1.0})])
    file.append("validation", [(0.0, {"step": 4, "val/accuracy": 0.75})])
    file.close()
    assert list(read_metrics(path)["step"]) == [1, 2, 3, 4]
    assert list(read_metrics(path).columns) == ["step", "attempt", "timestamp", "loss"]
    validation = read_metrics(path, kind="validation")
    assert validation.to_dict("list") == {
        "step": [3, 4],
        "attempt": [1, 1],
        "timestamp": [0.0, 0.0],
        "val/accuracy": [0.5, 0.75],
    }
    with pytest.raises(ValueError, match=r"kind must be one of \('train', 'validation'\), got 'attempt'"):
        read_metrics(path, kind="attempt")


def test_non_finite_metrics_come_back_as_floats(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    values = (math.nan, math.inf, -math.inf, 0.1)
    file.append("train", [(0.0, {"step": i, "loss": value}) for i, value in enumerate(values)])
    file.close()
    loss = read_metrics(file.path)["loss"]
    assert loss.dtype == float
    assert math.isnan(loss[0])
    assert list(loss[1:]) == list(values[1:])


def test_a_metric_that_comes_and_goes_is_nan_where_it_is_not(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    file.append("train", [(0.0, {"step": 1, "loss": 1.0}), (0.0, {"step": 2, "loss": 2.0, "niah": 0.5})])
    file.close()
    table = read_metrics(str(file.path))
    assert list(table.columns) == ["step", "attempt", "timestamp", "loss", "niah"]
    assert math.isnan(table["niah"][0])
    assert table["niah"][1] == 0.5


@pytest.mark.parametrize("content", ["empty", "header"])
def test_a_file_without_steps_is_an_empty_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    if content == "header":
        MetricsFile(path, step=0).close()
    table = read_metrics(path)
    assert table.empty
    assert {name: str(kind) for name, kind in table.dtypes.items()} == {
        "step": "int64",
        "attempt": "int64",
        "timestamp": "float64",
    }


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_write_torn_at_any_byte_loses_that_step_alone_until_it_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, 0, range(1, 4))
    whole = path.read_bytes()
    start_of_last = whole[:-1].rfind(b"\n") + 1
    for end in range(start_of_last, len(whole) + 1):
        path.write_bytes(whole[:end])
        # without its newline the record is complete nevertheless
        survives = end >= len(whole) - 1
        assert list(read_metrics(path)["step"]) == [1, 2, 3][: 3 if survives else 2], end
        write_attempt(path, 2, range(3, 6))
        table = read_metrics(path)
        assert list(table["step"]) == [1, 2, 3, 4, 5], end
        assert list(table["attempt"]) == [1, 1, 2, 2, 2], end


def test_a_header_torn_at_any_byte_after_a_torn_record_is_no_corruption(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, 0, range(1, 4))
    torn = path.read_bytes()[:-9]
    path.write_bytes(torn)
    MetricsFile(path, step=2).close()
    whole = path.read_bytes()
    for end in range(len(torn), len(whole) + 1):
        path.write_bytes(whole[:end])
        assert list(read_metrics(path)["step"]) == [1, 2], end
        write_attempt(path, 2, range(3, 6))
        table = read_metrics(path)
        assert list(table["step"]) == [1, 2, 3, 4, 5], end
        complete = end >= len(whole) - 1
        assert list(table["attempt"]) == [1, 1] + [3 if complete else 2] * 3, end


@pytest.mark.parametrize("damage", [b"\0", b"}", b'"'])
def test_damage_inside_an_attempt_is_reported_with_its_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, 0, range(1, 5))
    write_attempt(path, 3, range(4, 7))
    lines = path.read_bytes().splitlines()
    ends_of_attempts = {5, len(lines)}
    for number in range(1, len(lines) + 1):
        broken = lines.copy()
        broken[number - 1] = broken[number - 1][:9] + damage + broken[number - 1][10:]
        path.write_bytes(b"\n".join(broken) + b"\n")
        if number in ends_of_attempts:
            assert set(read_metrics(path)["step"]) >= {1, 2, 3, 4, 5}
        else:
            with pytest.raises(
                CorruptMetricsError, match=rf"metrics\.jsonl, line {number}: not a record"
            ) as error:
                read_metrics(path)
            assert error.value.line_number == number


def test_a_missing_header_and_a_second_writer_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, 0, range(1, 3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(CorruptMetricsError, match="line 1: a record of attempt 1 among those of attempt 0"):
        read_metrics(path)
    path.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(CorruptMetricsError, match="line 4: attempt 1 opens after attempt 1"):
        read_metrics(path)


def run_writer(path: Path, checkpoint: Path, cut: int) -> subprocess.Popen[bytes]:
    first = int(checkpoint.read_text()) + 1 if checkpoint.exists() else 1
    source = callbacks.metrics_file.__file__
    arguments = [source, str(path), str(checkpoint), str(first), str(cut)]
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments])


def assert_every_step_once(path: Path, checkpoint: Path, attempts: int) -> None:
    table = read_metrics(path)
    durable = int(checkpoint.read_text())
    assert len(table) >= durable
    assert list(table["step"]) == list(range(1, len(table) + 1))
    assert list(table["loss"]) == [1 / step for step in table["step"]]
    assert list(table["attempt_of"]) == list(table["attempt"])
    assert set(table["attempt"]) == set(range(1, attempts + 1))
    assert table["attempt"].is_monotonic_increasing


def test_processes_killed_in_the_middle_of_a_write_leave_every_step_once(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "metrics.jsonl", tmp_path / "checkpoint"
    for attempt, cut in enumerate((0, 1, 2000, 2345), start=1):
        process = run_writer(path, checkpoint, cut)
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert cut == 0 or not path.read_bytes().endswith(b"\n")
        assert_every_step_once(path, checkpoint, attempt)


def test_a_process_killed_at_any_moment_leaves_every_step_once(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "metrics.jsonl", tmp_path / "checkpoint"
    process = run_writer(path, checkpoint, -1)
    try:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert_every_step_once(path, checkpoint, 1)
