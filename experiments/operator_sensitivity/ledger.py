"""The CSV of finished runs: one row a run, whole or not there, and the curves beside it."""

import csv
import fcntl
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.operator_sensitivity.columns import COLUMNS, OK, check_line
from experiments.operator_sensitivity.runs import FIELDS, GATED, MODES, Run
from lightning_modules.atomic_file import atomic_file

TIMINGS = ("wall_time_total_s", "mean_outer_step_time_s", "peak_cuda_mem_bytes")

Row = Mapping[str, object]
Curves = dict[str, NDArray[np.float64]]


class Ledger:
    """Rows of finished runs in ``<directory>/<tag>_runs.csv``, curves in ``<directory>/<tag>_curves``.

    A shard writes ``<tag>_runs.shard-<i>-of-<n>.csv`` instead; all of them are read. A failed run
    that is repeated has two rows, of which the one that succeeded counts, or else the last.

    Args:
        directory: where everything stands; made when something is written.
        tag: names the study, see `checked_tag`.
        shard: (index, count) of this writer; None for the only one.
    """

    def __init__(self, directory: Path, tag: str, shard: tuple[int, int] | None = None) -> None:
        suffix = "" if shard is None else f".shard-{shard[0]}-of-{shard[1]}"
        self.directory, self.tag = directory, checked_tag(tag)
        self.path = directory / f"{tag}_runs{suffix}.csv"

    def append(self, row: Row) -> None:
        """Add one row and wait until it is on the disk.

        Raises:
            ValueError: the row has other columns than `COLUMNS`, or the file has.
        """
        if set(row) != set(COLUMNS):
            raise ValueError(f"a row needs the columns {COLUMNS}; differing: {set(row) ^ set(COLUMNS)}")
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            empty = _repair(file, self.path) == 0
            lines = ([_line(COLUMNS)] if empty else []) + [_line([_one_line(row[c]) for c in COLUMNS])]
            # one write, so that another reader sees the whole row or nothing of it
            os.write(file.fileno(), b"".join(lines))
            os.fsync(file.fileno())

    def read(self) -> pd.DataFrame:
        """One row of every run in all files, see `in_order`; a half-written last line is no row."""
        paths = [self.directory / f"{self.tag}_runs.csv"]
        paths += sorted(self.directory.glob(f"{self.tag}_runs.shard-*-of-*.csv"))
        found = [_read(path) for path in paths if path.exists()]
        return in_order(pd.concat(found)) if found else pd.DataFrame(columns=list(COLUMNS))

    def finished(self, *, failed_too: bool = True) -> set[str]:
        """Identifiers of the runs that have a row, or of those alone that succeeded."""
        table = self.read()
        return set(table["run_id"] if failed_too else table.loc[table["status"] == OK, "run_id"])

    def write_curves(self, run: Run, curves: Curves) -> None:
        """Keep a run's per-step values; written before its row, so that a row's curves are there."""
        path = self._curves(run.run_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.savez_compressed(file, **curves)  # type: ignore[arg-type]  # numpy types the keywords as flags

    def curves(self, run_id: str) -> Curves | None:
        """A run's per-step values; None where they were not kept."""
        path = self._curves(run_id)
        if not path.exists():
            return None
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}

    def _curves(self, run_id: str) -> Path:
        return self.directory / f"{self.tag}_curves" / f"{run_id}.npz"


def checked_tag(tag: str) -> str:
    """A tag whose files are no other tag's, nor in another directory.

    Raises:
        ValueError: for anything but letters, digits, hyphens and underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", tag):
        raise ValueError(f"--tag must be letters, digits, hyphens and underscores, got {tag!r}")
    return tag


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run, sorted as the tables are, whatever order the runs ended in.

    Of several rows of a run the last one counts, but one that succeeded beats one that failed.
    """
    table = table.sort_values("status", key=lambda status: status == OK, kind="stable")
    table = table.drop_duplicates("run_id", keep="last").reset_index(drop=True)
    keys = table.assign(gated=table["backend"].isin(GATED), mode=table["mode"].map(MODES.index))
    return table.loc[keys.sort_values(["gated", *FIELDS]).index].reset_index(drop=True)


def write_csv(rows: Iterable[Row] | pd.DataFrame, path: Path) -> None:
    """A whole table, in place of what stood there."""
    table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    with atomic_file(path) as file:
        file.write(table.to_csv(index=False).encode())


def _read(path: Path) -> pd.DataFrame:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        return pd.DataFrame(columns=list(COLUMNS))
    _check_header(whole, path)
    for number, line in enumerate(whole.split(b"\n")[1:-1], start=2):
        try:
            check_line(line)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {number} is no row of a run: {error}") from error
    table = pd.read_csv(
        io.BytesIO(whole), dtype={"run_id": str, "error": str, "versions": str, "commit": str}
    )
    return table.fillna({"error": ""})


def _repair(file: BinaryIO, path: Path) -> int:
    """Cut off a line without its end, which a killed writer left; the size that remains."""
    file.seek(0)
    data = file.read()
    size = data.rfind(b"\n") + 1
    if size < len(data):
        file.truncate(size)
    if size:
        _check_header(data[:size], path)
    return size


def _check_header(data: bytes, path: Path) -> None:
    header = next(csv.reader([data.split(b"\n", 1)[0].decode()]))
    if tuple(header) != COLUMNS:
        raise ValueError(
            f"{path} has other columns than this version writes: {sorted(set(header) ^ set(COLUMNS))} differ;"
            " give another --tag or --out"
        )


def _line(cells: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _one_line(value: object) -> object:
    return " ".join(value.split()) if isinstance(value, str) else value
