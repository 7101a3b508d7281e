"""A process of its own that does one run after another, and whose death is no more than a failed run."""

import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Final, Self

from experiments.operator_sensitivity.columns import FAILED
from experiments.operator_sensitivity.fit import perform, prepare_process, row_of
from experiments.operator_sensitivity.ledger import Curves
from experiments.operator_sensitivity.runs import Run

Outcome = tuple[Run, dict[str, object], Curves]

START_METHOD: Final = "spawn"
"""A process that was forked could not use CUDA, and would inherit the threads of torch."""


class Worker:
    """Does a run at a time in another process, which ends with the ``with`` block.

    Args:
        commit: goes into the rows.

    Attributes:
        process: the other process.
        connection: becomes readable when a run has ended, or the process has.
    """

    def __init__(self, commit: str) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self._commit = commit
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, commit), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, run: Run) -> None:
        """Begin a run."""
        self._run = run
        with suppress(BrokenPipeError):  # a process that is gone is noticed by its outcome
            self.connection.send(run)

    def outcome(self) -> Outcome:
        """Wait for the run's row and curves; if the process died, a row that says of what."""
        try:
            return self._run, *self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
        error = f"the process that ran it {_end(self.process.exitcode)}"
        return self._run, row_of(self._run, self._commit) | {"status": FAILED, "error": error}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _end(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"died with exit status {exitcode}"


def _work(connection: Connection, commit: str) -> None:
    # an interrupt from the keyboard reaches every process; the one that writes the rows answers it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_process()
    with suppress(EOFError):
        while True:
            connection.send(perform(connection.recv(), commit))
