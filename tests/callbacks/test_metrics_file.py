import json
import math
import os
from pathlib import Path

import pytest

from callbacks.metrics_file import MetricsFile, decode_record, encode_record


def refuse(token: str) -> float:
    raise AssertionError(f"{token} is not strict JSON")


@pytest.mark.parametrize("value", [0.1, -0.0, 5e-324, 1.7976931348623157e308, 3.0, math.inf, -math.inf])
def test_a_metric_survives_the_line_exactly(value: float) -> None:
    line = encode_record("train", attempt=2, step=7, timestamp=1.25, metrics={"loss": value})
    json.loads(line, parse_constant=refuse)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    record = decode_record(line)
    assert record == {"kind": "train", "attempt": 2, "step": 7, "timestamp": 1.25, "loss": value}
    assert math.copysign(1, record["loss"]) == math.copysign(1, value)


def test_nan_is_strict_json_and_comes_back_as_nan() -> None:
    line = encode_record("train", attempt=1, step=1, timestamp=0.0, metrics={"loss": math.nan})
    assert json.loads(line, parse_constant=refuse)["loss"] == "NaN"
    record = decode_record(line)
    assert record is not None
    assert math.isnan(record["loss"])


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\0\0\0",
        b"\xff\xfe",
        b"[1]",
        b'{"kind":"train","attempt":1,"step":1}',
        b'{"kind":"train","attempt":1,"step":1,"timestamp":"NaN"}',
        b'{"kind":"train","attempt":1,"step":1.5,"timestamp":0}',
        b'{"kind":"train","attempt":true,"step":1,"timestamp":0}',
        b'{"attempt":1,"step":1,"timestamp":0}',
        b'{"kind":"tRain","attempt":1,"step":1,"timestamp":0}',
        b'{"kind":["train"],"attempt":1,"step":1,"timestamp":0}',
        b'{"kind":"train","attempt":1,"step":1,"timestamp":0,"loss":NaN}',
        b'{"kind":"train","attempt":1,"step":1,"timestamp":0,"loss":"nine"}',
    ],
)
def test_what_is_not_a_record_is_none(line: bytes) -> None:
    assert decode_record(line) is None


def test_attempts_count_on_from_the_largest_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    for opened, step in enumerate((0, 50, 20)):
        file = MetricsFile(path, step=step)
        assert file.attempt == 2 * opened + 1
        file.start_attempt(step=step)
        file.append("train", [(0.5, {"step": step + 1, "loss": 1.0})])
        file.close()
    records = [decode_record(line) for line in path.read_bytes().splitlines()]
    assert [(r["kind"], r["attempt"], r["step"]) for r in records if r] == [
        ("attempt", 1, 0),
        ("attempt", 2, 0),
        ("train", 2, 1),
        ("attempt", 3, 50),
        ("attempt", 4, 50),
        ("train", 4, 51),
        ("attempt", 5, 20),
        ("attempt", 6, 20),
        ("train", 6, 21),
    ]


@pytest.mark.parametrize("tail", [b'{"kind":"tr', b"\0\0\0\0", b"\xc3"])
def test_a_new_attempt_begins_on_a_fresh_line_and_keeps_what_stood_before(
    tmp_path: Path, tail: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, step=0).close()
    before = path.read_bytes()
    path.write_bytes(before + tail)
    file = MetricsFile(path, step=0)
    file.close()
    assert file.attempt == 2
    assert path.read_bytes().startswith(before + tail + b'\n{"kind":"attempt","attempt":2,')


def test_a_block_reaches_the_system_in_one_write_and_the_disk_on_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    file.append("train", [(0.0, {"step": step, "loss": 1.0}) for step in (1, 2, 3)])
    assert len(file.path.read_bytes().splitlines()) == 4
    assert synced == []
    file.sync()
    assert synced == [file.path.stat().st_ino]
    file.close()
    file.close()
    assert synced == [file.path.stat().st_ino] * 2


def test_a_new_file_is_made_durable_with_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    assert tmp_path.stat().st_ino in synced
    file.close()


@pytest.mark.parametrize("name", ["kind", "attempt", "timestamp"])
def test_reserved_names_are_refused(tmp_path: Path, name: str) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl reserves the names \['{name}'\]"):
        file.append("train", [(0.0, {"step": 1, name: 1.0})])
    file.close()
