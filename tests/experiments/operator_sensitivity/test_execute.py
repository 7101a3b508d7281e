"""Runs are done once, whatever interrupts them, and the same in any number of processes."""

import dataclasses
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from experiments.operator_sensitivity import execute as module
from experiments.operator_sensitivity import worker
from experiments.operator_sensitivity.execute import current_commit, execute
from experiments.operator_sensitivity.ledger import TIMINGS, Ledger
from experiments.operator_sensitivity.runs import grid


@pytest.fixture
def performed(monkeypatch, made):
    """Identifiers of the runs that were done, without training."""
    done: list[str] = []

    def perform(run, commit):
        if run.seed == 99:
            raise KeyboardInterrupt
        done.append(run.run_id)
        failed = {"status": "FAILED", "error": "it", "final_acc": ""} if run.seed == 5 else {}
        return made.row(run, 0.5, **failed), {}

    monkeypatch.setattr(module, "perform", perform)
    return done


def test_interrupted_it_goes_on_with_what_is_missing(tmp_path, made, performed):
    ledger = Ledger(tmp_path, "t")
    runs = [dataclasses.replace(made.TINY, seed=s) for s in (0, 1, 99, 2)]
    with pytest.raises(KeyboardInterrupt):
        execute(runs, ledger, jobs=1)
    assert performed == [run.run_id for run in runs[:2]]
    assert execute([runs[0], runs[1], runs[3]], ledger, jobs=1) == 1
    assert len(performed) == len(set(performed)) == 3
    assert execute([runs[0], runs[1], runs[3]], ledger, jobs=1) == 0


def test_runs_of_other_shards_are_not_repeated(tmp_path, made, performed):
    runs = [dataclasses.replace(made.TINY, seed=s) for s in range(4)]
    execute(runs[:2], Ledger(tmp_path, "t", (0, 2)), jobs=1)
    assert execute(runs, Ledger(tmp_path, "t", (1, 2)), jobs=1) == 2
    assert len(Ledger(tmp_path, "t").read()) == 4


def test_failed_runs_are_repeated_when_asked(tmp_path, made, performed):
    ledger = Ledger(tmp_path, "t")
    runs = [dataclasses.replace(made.TINY, seed=s) for s in (4, 5)]
    execute(runs, ledger, jobs=1)
    assert execute(runs, ledger, jobs=1) == 0
    assert execute(runs, ledger, jobs=1, retry_failed=True) == 1
    assert ledger.read()["status"].tolist() == ["OK", "FAILED"]


def test_a_row_is_there_only_once_its_curves_are(tmp_path, made, monkeypatch):
    """Killed between the two, the run is not done."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "perform", lambda run, commit: (made.row(run, 0.5), {"loss": np.ones(3)}))
    ledger = Ledger(tmp_path, "t")
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "write_curves", interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute([made.TINY], ledger, jobs=1)
    assert ledger.finished() == set()
    assert execute([made.TINY], ledger, jobs=1) == 1
    assert ledger.curves(made.TINY.run_id) is not None


def test_processes_give_the_rows_of_one(tmp_path, made, monkeypatch):
    runs = grid(made.TINY, modes=("FULL", "FO"), inner_steps=(1,), seeds=(0, 1))
    one, two = Ledger(tmp_path, "one"), Ledger(tmp_path, "two")
    assert execute(runs, one, jobs=1) == 4
    assert execute(runs, two, jobs=2) == 4
    tables = [ledger.read().drop(columns=list(TIMINGS)) for ledger in (one, two)]
    assert tables[0].equals(tables[1])
    assert (tables[0]["status"] == "OK").all()
    assert all(one.curves(run.run_id) is not None for run in runs)


@pytest.fixture
def forked(monkeypatch):
    """Processes that start at once, with what a test has replaced."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")


# Python's from 3.12 on: torch has threads, which a forked process does without
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("die", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
        (lambda: os._exit(7), "died with exit status 7"),
    ],
)
def test_a_process_that_dies_costs_its_run_alone(tmp_path, made, monkeypatch, forked, die, said):
    def perform(run, commit):
        if run.seed in (1, 4):
            die()
        time.sleep(0.05)
        return made.row(run, 0.5), {"loss": np.ones(3)}

    monkeypatch.setattr(worker, "perform", perform)
    ledger = Ledger(tmp_path, "t")
    runs = [dataclasses.replace(made.TINY, seed=s) for s in range(7)]
    assert execute(runs, ledger, jobs=2) == 7
    rows = ledger.read().set_index("seed")
    assert rows.index[rows["status"] == "FAILED"].tolist() == [1, 4]
    assert rows.loc[[1, 4], "error"].str.endswith(said).all()
    assert rows.index[rows["status"] == "OK"].tolist() == [0, 2, 3, 5, 6]
    assert multiprocessing.active_children() == []


def test_the_commit_is_named():
    assert current_commit()
