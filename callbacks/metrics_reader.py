"""Reads ``metrics.jsonl`` back as a table in which every step stands once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from callbacks.metrics_file import ATTEMPT_LINE_START, ROW_KINDS, RowKind, decode_record

_KEY_TYPES = {"step": "int64", "attempt": "int64", "timestamp": "float64"}


class CorruptMetricsError(ValueError):
    """A metrics file is damaged in a way that no crash of its writer explains."""

    def __init__(self, path: Path, line_number: int, reason: str) -> None:
        super().__init__(f"{path}, line {line_number}: {reason}; repair or remove that line to read the rest")
        self.path = path
        self.line_number = line_number


def read_metrics(path: str | os.PathLike[str], kind: RowKind = "train") -> pd.DataFrame:
    """Every step of a run once, in order: of a step that several attempts recorded, the last attempt's row.

    A line that a crash cut off at the end of an attempt is left out: the rows that a checkpoint builds on are
    on the disk before the checkpoint is, so the attempt that resumes records that step again.

    Args:
        path: the file that ``MetricsJSONL`` wrote; it may still be growing.
        kind: "train" for one row per training step, "validation" for one row per step that was validated.

    Returns:
        A table with the columns step, attempt, timestamp (seconds since the epoch) and one for each metric,
        NaN where a row has no such metric; without rows where the file has none.

    Raises:
        CorruptMetricsError: a line that is no record anywhere but at the end of an attempt, an attempt that
            does not follow the ones before it, or a record among those of another attempt.
        ValueError: an unknown ``kind``.
        FileNotFoundError: no such file.
    """
    if kind not in ROW_KINDS:
        raise ValueError(f"kind must be one of {ROW_KINDS}, got {kind!r}")
    last_of_step = {record["step"]: record for record in _records(Path(path)) if record["kind"] == kind}
    if not last_of_step:
        return pd.DataFrame({"step": [], "attempt": [], "timestamp": []}).astype(_KEY_TYPES)
    table = pd.DataFrame([last_of_step[step] for step in sorted(last_of_step)]).drop(columns="kind")
    return table[[*_KEY_TYPES, *(name for name in table.columns if name not in _KEY_TYPES)]]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    attempt = 0
    for index, line in enumerate(lines):
        record = decode_record(line)
        if record is None:
            if index + 1 < len(lines) and not _opens_attempt(lines[index + 1]):
                raise CorruptMetricsError(path, index + 1, "not a record, and not at the end of an attempt")
            continue
        if record["kind"] == "attempt":
            if record["attempt"] <= attempt:
                raise CorruptMetricsError(
                    path, index + 1, f"attempt {record['attempt']} opens after attempt {attempt}"
                )
            attempt = record["attempt"]
        elif record["attempt"] != attempt:
            raise CorruptMetricsError(
                path, index + 1, f"a record of attempt {record['attempt']} among those of attempt {attempt}"
            )
        yield record


def _opens_attempt(line: bytes) -> bool:
    """Whether a line is the first of an attempt, which a crash may have cut off as well."""
    return line.startswith(ATTEMPT_LINE_START) or ATTEMPT_LINE_START.startswith(line)
