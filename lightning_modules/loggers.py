"""Loggers that write into one run directory and, after a resume, go on in the files that are there."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_modules.atomic_file import atomic_file

Row = dict[str, Any]


class RunLogger(Logger):
    """A logger of one run directory, which the command line chooses with `bind` before anything is logged.

    A row belongs to the checkpoint whose step is larger than its own: as Lightning does, rows of the n-th
    training step and of the validation after it are logged at step n - 1.
    """

    directory: Path | None = None
    resumed_step: int | None = None

    def bind(self, directory: Path, resumed_step: int | None = None) -> None:
        """Write into `directory`, after the rows that the checkpoint of `resumed_step` stands for."""
        self.directory = directory
        self.resumed_step = resumed_step

    @property
    def log_dir(self) -> str:
        """The run directory."""
        if self.directory is None:
            raise RuntimeError(f"{type(self).__name__} has no directory yet: pass one, or call bind")
        return str(self.directory)

    @property
    def root_dir(self) -> str:
        """The directory of all runs of this name."""
        return str(Path(self.log_dir).parent)

    @property
    def save_dir(self) -> str:
        """The directory of all runs."""
        return str(Path(self.log_dir).parent.parent)

    @property
    def name(self) -> str:
        """What the run is called."""
        return Path(self.log_dir).parent.name

    @property
    def version(self) -> int | str:
        """Which of the runs of this name it is: N of `version_N`, else the directory's name."""
        name = Path(self.log_dir).name
        number = name.removeprefix("version_")
        return int(number) if number != name and number.isdigit() else name


class RunTensorBoardLogger(RunLogger, TensorBoardLogger):
    """TensorBoard events in the run directory; those that a resumed run supersedes are hidden.

    Args:
        directory: the run directory; null lets the command line choose it.
    """

    def __init__(self, directory: str | None = None) -> None:
        TensorBoardLogger.__init__(self, save_dir="", default_hp_metric=False)
        if directory is not None:
            self.bind(Path(directory))

    def bind(self, directory: Path, resumed_step: int | None = None) -> None:
        """Write into `directory`; events from `resumed_step` on, of earlier files, are superseded."""
        super().bind(directory, resumed_step)
        if resumed_step is not None:
            self._kwargs["purge_step"] = resumed_step

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The open writer."""
        is_new = self._experiment is None
        writer: SummaryWriter = super().experiment
        if is_new and self.resumed_step is not None:
            # TensorBoard takes the first start that it meets for the run's own, and hides nothing behind it
            start = Event(step=self.resumed_step, session_log=SessionLog(status=SessionLog.START))
            writer._get_file_writer().add_event(start, self.resumed_step)
        return writer


class RunCSVLogger(RunLogger, CSVLogger):
    """Every logged row, in `metrics.csv` of the run directory; a resumed run goes on without gap or repeat.

    Args:
        directory: the run directory; null lets the command line choose it.
    """

    def __init__(self, directory: str | None = None) -> None:
        CSVLogger.__init__(self, save_dir="")
        self._table: MetricsTable | None = None
        self._last_step = self.resumed_step or 0
        if directory is not None:
            self.bind(Path(directory))

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsTable":
        """The open table."""
        if self._table is None:
            self._table = MetricsTable(Path(self.log_dir) / "metrics.csv", self.resumed_step)
        return self._table

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        """Keep a row until the next `save`; without a step it is one of the last row's."""
        self._last_step = self._last_step if step is None else step
        self.experiment.append(metrics, self._last_step)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` in the run directory has them."""

    @rank_zero_only
    def save(self) -> None:
        """Write the rows to the file."""
        self.experiment.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last rows."""
        if self._table is not None:
            self._table.save()


class MetricsTable:
    """A CSV file that grows by rows and, where a row brings a new name, by columns.

    Args:
        path: the file; its directory is made where it does not exist.
        resumed_step: rows of this step and later, which a resumed run writes again, are dropped from a file
            that is there; so is a last row that a kill cut off.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        self.path = path
        self._waiting: list[Row] = []
        self._names: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            rows = self._whole_rows()
            self._rewrite([row for row in rows if resumed_step is None or int(row["step"]) < resumed_step])

    def append(self, metrics: Mapping[str, Tensor | float], step: int) -> None:
        """Add a row, to be written by the next `save`."""
        values = {
            name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()
        }
        self._waiting.append(values | {"step": step})

    def save(self) -> None:
        """Write the waiting rows at the end of the file, or the whole file anew if they bring new columns."""
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        if {name for row in rows for name in row} <= set(self._names):
            with self.path.open("a", newline="") as file:
                file.write(self._as_csv(rows))
        else:
            self._rewrite([*self._whole_rows(), *rows])

    def _rewrite(self, rows: list[Row]) -> None:
        names = {"step", *self._names, *(name for row in rows for name in row)}
        self._names = ["step", *sorted(names - {"step"})]
        with atomic_file(self.path) as file:
            file.write((",".join(self._names) + "\n" + self._as_csv(rows)).encode())

    def _as_csv(self, rows: list[Row]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._names, lineterminator="\n").writerows(rows)
        return text.getvalue()

    def _whole_rows(self) -> list[Row]:
        if not self.path.exists():
            return []
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        return list(csv.DictReader(io.StringIO(whole, newline="")))
