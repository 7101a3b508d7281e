"""The format of ``metrics.jsonl`` and its append-only writer.

One JSON object a line, in the order of writing:

- ``{"kind":"attempt","attempt":n,"step":s,"timestamp":t}`` opens attempt n (1, 2, ...), which goes on after
  step s; a resume and a rollback each open one;
- ``{"kind":"train","attempt":n,"step":s,"timestamp":t,...}`` holds the metrics of step s;
- ``{"kind":"validation",...}`` holds those of a validation run after step s.

Timestamps are seconds since the epoch (UTC). JSON has no token for a number that is not finite: such a metric
is one of the strings "NaN", "Infinity" and "-Infinity", and the reader turns it back into the float.

Nothing is ever rewritten. A crash can only cut off the last line of an attempt; the next attempt begins on a
fresh line, so whatever follows stays readable.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

ATTEMPT_LINE_START = b'{"kind":"attempt"'
RowKind = Literal["train", "validation"]
ROW_KINDS: tuple[RowKind, ...] = ("train", "validation")

_RESERVED = frozenset({"kind", "attempt", "timestamp"})
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_record(
    kind: RowKind | Literal["attempt"],
    *,
    attempt: int,
    step: int,
    timestamp: float,
    metrics: Mapping[str, float] | None = None,
) -> bytes:
    """One record as a line of strict JSON, its newline included."""
    record: dict[str, Any] = {"kind": kind, "attempt": attempt, "step": step, "timestamp": timestamp}
    for name, value in (metrics or {}).items():
        record[name] = value if math.isfinite(value) else _non_finite_name(value)
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line (with or without its newline), or None where the line is not one."""
    try:
        record = json.loads(line.decode(), parse_constant=_refuse_constant)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("kind") not in ("attempt", *ROW_KINDS):
        return None
    if not all(type(record.get(name)) is int for name in ("attempt", "step")):
        return None
    if not isinstance(record.get("timestamp"), int | float):
        return None
    for name, value in record.items():
        if name != "kind" and isinstance(value, str):
            if value not in _NON_FINITE:
                return None
            record[name] = _NON_FINITE[value]
    return record


class MetricsFile:
    """The open end of a metrics file; opening it starts the attempt after the largest one in it.

    Args:
        path: the file, created with its directory where it does not exist.
        step: the step after which this attempt goes on.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        existing = path.read_bytes() if path.exists() else b""
        self._file = path.open("ab")
        _sync_directory(path.parent)
        records = filter(None, map(decode_record, existing.split(b"\n")))
        self.attempt = max((record["attempt"] for record in records), default=0)
        self._start = b"" if existing.endswith(b"\n") or not existing else b"\n"
        self.start_attempt(step=step)

    def start_attempt(self, *, step: int) -> None:
        """Open the next attempt: from now on its records supersede those of the same steps before it."""
        self.attempt += 1
        header = encode_record("attempt", attempt=self.attempt, step=step, timestamp=time.time())
        self._write(self._start + header)
        self._start = b""

    def append(self, kind: RowKind, rows: Iterable[tuple[float, Mapping[str, float]]]) -> None:
        """Hand a block of (timestamp, row) to the operating system in one write; a row holds its "step".

        Raises:
            ValueError: a metric has a name that the format reserves.
        """
        lines = []
        for timestamp, row in rows:
            reserved = sorted(_RESERVED.intersection(row))
            if reserved:
                raise ValueError(
                    f"{self.path.name} reserves the names {reserved}: call these metrics otherwise"
                )
            metrics = {name: float(value) for name, value in row.items() if name != "step"}
            lines.append(
                encode_record(
                    kind, attempt=self.attempt, step=int(row["step"]), timestamp=timestamp, metrics=metrics
                )
            )
        self._write(b"".join(lines))

    def sync(self) -> None:
        """Return once everything written is on the disk, so that a power cut cannot take it back."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file with everything written on the disk."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def _write(self, block: bytes) -> None:
        try:
            self._file.write(block)
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)  # of a full disk the system does not say where
            raise


def _non_finite_name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _refuse_constant(token: str) -> float:
    raise ValueError(f"{token} is not JSON")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
