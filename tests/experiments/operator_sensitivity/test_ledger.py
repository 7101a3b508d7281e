"""The CSV of runs survives whatever kills its writers."""

import csv
import dataclasses
import fcntl
import io
import multiprocessing
import os
import re
import threading
from os import write

import numpy as np
import pytest

from experiments.operator_sensitivity.columns import COLUMNS
from experiments.operator_sensitivity.ledger import Ledger


def test_rows_come_back_in_the_order_of_the_tables(tmp_path, made):
    runs = [dataclasses.replace(made.TINY, seed=s, mode=m) for s in (1, 0) for m in ("FO", "FULL")]
    ledger = Ledger(tmp_path, "t")
    for run in runs:
        ledger.append(made.row(run, 0.5 + run.seed / 3))
    table = ledger.read()
    assert list(table["mode"]) == ["FULL", "FULL", "FO", "FO"]
    assert list(table["seed"]) == [0, 1, 0, 1]
    assert table["final_acc"].tolist() == [0.5, 0.5 + 1 / 3] * 2


@pytest.mark.parametrize("cut", [1, 40, 150])
def test_a_half_written_row_is_no_row_and_is_repaired(tmp_path, made, cut):
    ledger = Ledger(tmp_path, "t")
    first, second, third = (dataclasses.replace(made.TINY, seed=s) for s in range(3))
    ledger.append(made.row(first, 0.5))
    ledger.append(made.row(second, 0.6))
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(data[:-cut])
    assert ledger.finished() == {first.run_id}
    ledger.append(made.row(third, 0.7))
    assert ledger.finished() == {first.run_id, third.run_id}
    ledger.append(made.row(second, 0.6))
    assert ledger.read()["final_acc"].tolist() == [0.5, 0.6, 0.7]


def test_a_half_written_header_is_repaired(tmp_path, made):
    ledger = Ledger(tmp_path, "t")
    ledger.path.write_text("run_id,back")
    assert ledger.finished() == set()
    ledger.append(made.row(made.TINY, 0.5))
    assert ledger.finished() == {made.TINY.run_id}


def test_shards_give_the_table_of_one_writer(tmp_path, made):
    runs = [dataclasses.replace(made.TINY, seed=s) for s in range(6)]
    (tmp_path / "one").mkdir()
    whole = Ledger(tmp_path / "one", "t")
    for run in reversed(runs):
        whole.append(made.row(run, run.seed / 10))
    for i in (1, 0):
        part = Ledger(tmp_path / "many", "t", (i, 2))
        for run in runs[i::2]:
            part.append(made.row(run, run.seed / 10))
    assert Ledger(tmp_path / "many", "t").read().equals(whole.read())


def test_other_tags_are_other_studies(tmp_path, made):
    Ledger(tmp_path, "a").append(made.row(made.TINY, 0.5))
    assert Ledger(tmp_path, "b").finished() == set()


@pytest.mark.parametrize("other", ["q_runs2", "q_runs", "q_runs_x", "qq"])
@pytest.mark.parametrize("part", [None, (0, 2)])
def test_a_tag_reads_no_tag_that_its_name_begins(tmp_path, made, other, part):
    Ledger(tmp_path, other, part).append(made.row(made.TINY, 0.5))
    assert Ledger(tmp_path, "q").finished() == set()
    Ledger(tmp_path, "q", part).append(made.row(made.TINY, 0.5))
    assert len(Ledger(tmp_path, "q").read()) == 1


@pytest.mark.parametrize("tag", ["", "a/b", "..", "a.b", "a[b]", "*", "a?", "a b", "a\n"])
def test_tags_that_could_be_other_files_are_refused(tmp_path, tag):
    with pytest.raises(ValueError, match="--tag"):
        Ledger(tmp_path, tag)


def test_success_counts_over_failure_whichever_came_last(tmp_path, made):
    for tag, order in (("a", (0, 1)), ("b", (1, 0))):
        ledger = Ledger(tmp_path, tag)
        rows = [
            made.row(made.TINY, 0.5),
            made.row(made.TINY, 0.5, final_acc="", status="FAILED", error='a,\n"b"'),
        ]
        for i in order:
            ledger.append(rows[i])
        assert ledger.read()["status"].tolist() == ["OK"]


def test_an_error_of_several_lines_is_one_row(tmp_path, made):
    ledger = Ledger(tmp_path, "t")
    ledger.append(made.row(made.TINY, 0.5, status="FAILED", error='one,\ntwo "three"'))
    assert ledger.read()["error"].tolist() == ['one, two "three"']
    assert ledger.path.read_bytes().count(b"\n") == 2
    assert ledger.finished(failed_too=False) == set()


def test_writers_at_the_same_time_do_not_tear_rows(tmp_path, made):
    ledger = Ledger(tmp_path, "t")

    def write(start: int) -> None:
        for seed in range(start, start + 20):
            ledger.append(made.row(dataclasses.replace(made.TINY, seed=seed), 0.5))

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 20, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ledger.read()["seed"]) == list(range(60))


# Python's from 3.12 on: torch has threads, which a forked process does without
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_process_waits_for_the_row_that_another_is_writing(tmp_path, made):
    """What it would otherwise take for the half line of a killed writer, and cut off."""
    ledger = Ledger(tmp_path, "t")
    first, second, third = (dataclasses.replace(made.TINY, seed=s) for s in range(3))
    for run in (first, second):
        ledger.append(made.row(run, 0.5))
    *kept, line = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(kept))
    process = multiprocessing.get_context("fork").Process(
        target=ledger.append, args=(made.row(third, 0.7),), daemon=True
    )
    with ledger.path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line[:50])
        process.start()
        process.join(0.3)
        file.write(line[50:])
        # closing it would not do, since the other process has it open as well
        fcntl.flock(file, fcntl.LOCK_UN)
    process.join(10)
    assert process.exitcode == 0
    assert ledger.read()["seed"].tolist() == [0, 1, 2]


def test_a_row_is_written_at_once(tmp_path, made, monkeypatch):
    """In one call to the system, its header and all, or else a reader or a kill could come between."""
    ledger = Ledger(tmp_path, "t")
    written = []
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(data) or write(descriptor, data))
    for seed in range(2):
        ledger.append(made.row(dataclasses.replace(made.TINY, seed=seed), 0.5))
    assert b"".join(written) == ledger.path.read_bytes()
    assert [data.count(b"\n") for data in written] == [2, 1]


def test_other_columns_are_refused(tmp_path, made):
    ledger = Ledger(tmp_path, "t")
    with pytest.raises(ValueError, match="extra"):
        ledger.append(made.row(made.TINY, 0.5, extra=1))
    ledger.path.write_text(",".join((*COLUMNS, "extra")) + "\n")
    with pytest.raises(ValueError, match=r"extra.*--tag"):
        ledger.append(made.row(made.TINY, 0.5))
    with pytest.raises(ValueError, match=r"extra.*--tag"):
        ledger.read()


def test_curves_come_back(tmp_path, made):
    ledger = Ledger(tmp_path, "t")
    assert ledger.curves(made.TINY.run_id) is None
    ledger.write_curves(made.TINY, {"loss": np.array([1.0, 1 / 3])})
    assert ledger.curves(made.TINY.run_id)["loss"].tolist() == [1.0, 1 / 3]


def cell(name: str, value: str):
    """A damage: this cell of a line holds something else."""

    def damage(line: str) -> str:
        cells = next(csv.reader([line]))
        cells[COLUMNS.index(name)] = value
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(cells)
        return text.getvalue()

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda line: line[:40], "cells instead of"),
        (lambda line: line + ",1", "cells instead of"),
        (lambda line: "", "0 cells instead of"),
        (lambda line: line + line, "cells instead of"),
        (lambda line: line.replace("torch 0", '"torch 0'), "unexpected end of data"),
        (lambda line: line.replace("torch 0", "\udcff"), "can't decode"),
        (cell("status", "DONE"), "status is 'DONE', none of OK, FAILED, NON_FINITE"),
        (cell("status", ""), "status is ''"),
        (cell("mode", "HALF"), "mode is 'HALF'"),
        (cell("backend", "tritonn"), "backend is 'tritonn'"),
        (cell("final_acc", "0.5.5"), "final_acc is '0.5.5', no number"),
        (cell("final_acc", ""), "final_acc is '', no number"),
        (cell("attn_second_order_ok", "Tru"), "neither True nor False"),
        (cell("seed", "x"), "invalid literal"),
        (cell("seed", "-1"), "seed must be at least 0"),
        (cell("seed", "7"), "not that of its fields"),
        (cell("noise", "1.5"), "not that of its fields"),
        (cell("absorb_projections", "True"), "not that of its fields"),
        (cell("run_id", "0123456789ab"), "not that of its fields"),
    ],
)
def test_a_damaged_line_is_named_and_no_finished_run(tmp_path, made, damage, said):
    ledger = Ledger(tmp_path, "t")
    for seed in range(3):
        ledger.append(made.row(dataclasses.replace(made.TINY, seed=seed), 0.5))
    lines = ledger.path.read_text().split("\n")
    lines[2] = damage(lines[2])
    ledger.path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    for use in (ledger.read, ledger.finished):
        with pytest.raises(
            ValueError, match=re.escape(f"{ledger.path}, line 3 is no row of a run: ")
        ) as found:
            use()
        assert said in str(found.value)


@pytest.mark.parametrize("status", ["FAILED", "NON_FINITE"])
def test_a_row_without_figures_is_whole(tmp_path, made, status):
    ledger = Ledger(tmp_path, "t")
    nothing = dict.fromkeys(("final_acc", "final_loss", "autocast", "attn_second_order_ok"), "")
    ledger.append(made.row(made.TINY, 0.5, **nothing, status=status, error="it"))
    assert ledger.read()["status"].tolist() == [status]
