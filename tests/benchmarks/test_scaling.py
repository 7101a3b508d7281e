"""The scaling benchmark: its arithmetic, a row for every run whatever becomes of it, and one whole page."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm_python

from benchmarks import scaling, scaling_runs
from benchmarks.scaling import Case, Outcome, Plan, case_row, cases_of, page, resume_row
from benchmarks.scaling_runs import SINGLE, UNCAPTURED, call, largest_difference, read, run
from callbacks.metrics_file import MetricsFile

MODULE = "MemoryLM"
ALONE = Case(MODULE, SINGLE, 1)
PLAN = Plan("cpu", Path(), warm_up=2, steps=4, block=2, more=2, timeout=60)
ONE = Outcome([0.5, 0.25, 0.5], 3 * 2**20, {1: 2.0, 2: 1.0}, ("cpu",))
TWO = Outcome([0.25, 0.4, 0.25], 2 * 2**20, {1: 2.0, 2: 1.1}, ("cpu", "cpu"))


def test_efficiency_is_a_share_of_the_devices_only_where_the_batch_is_divided():
    strong = case_row(Case(MODULE, "fsdp", 2), TWO, ONE, "cpu")
    assert strong == [MODULE, "fsdp", "2", "strong", "8", "4.00", "2.50 to 4.00", "100%", "2", "1.0e-01"]
    weak = case_row(Case(MODULE, "ddp", 2, weak=True), TWO, ONE, "cpu")
    assert weak == [MODULE, "ddp", "2", "weak", "16", "4.00", "2.50 to 4.00", "200%", "2", ""]
    assert case_row(ALONE, ONE, ONE, "cpu")[3:] == ["", "8", "2.00", "2.00 to 4.00", "", "3", ""]


def test_a_difference_is_relative_and_of_steps_that_both_have():
    assert largest_difference({2: 3.0}, {1: 1.0, 2: 4.0}) == 0.25
    for losses in ({}, {3: 1.0}):
        with pytest.raises(ValueError, match="are not among"):
            largest_difference(losses, {1: 1.0})


def test_every_strategy_that_a_module_takes_is_run_both_ways():
    assert cases_of("MetaSeqClassifier", ["ddp", "fsdp"], [1, 2], "cuda") == [
        Case("MetaSeqClassifier", SINGLE, 1),
        Case("MetaSeqClassifier", "ddp", 2),
        Case("MetaSeqClassifier", "ddp", 2, weak=True),
    ]
    assert {case.strategy for case in cases_of(MODULE, ["fsdp"], [1, 2, 4], "cpu")} == {SINGLE, "fsdp"}
    assert cases_of(MODULE, ["fsdp"], [1, 2], "cuda") == [
        ALONE,
        Case(MODULE, UNCAPTURED, 1),
        Case(MODULE, "fsdp", 2),
        Case(MODULE, "fsdp", 2, weak=True),
    ]


def test_a_block_lasts_as_long_as_for_the_slowest(tmp_path):
    for rank, seconds in enumerate(([1.0, 4.0], [2.0, 3.0])):
        found = {"seconds": seconds, "device": f"d{rank}", "peak_bytes": 5 - rank}
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps(found))
    folder = tmp_path / "run" / "version_0"
    folder.mkdir(parents=True)
    file = MetricsFile(folder / "metrics.jsonl", step=0)
    file.append("train", [(0.0, {"step": 1, "loss": 2.5})])
    file.close()
    assert read(tmp_path, 2, 2) == Outcome([1.0, 2.0], 5, {1: 2.5}, ("d0", "d1"))


def test_a_run_that_fails_is_a_row_and_a_status(tmp_path, monkeypatch):
    failed = Outcome([], 0, {}, (), "status 2: no such device")
    spread = Case(MODULE, "ddp", 2)
    assert case_row(spread, failed, ONE, "cpu")[5] == "failed: status 2: no such device"
    assert resume_row(ALONE, spread, failed, ONE)[1:] == [
        SINGLE,
        "ddp on 2",
        "",
        "failed: status 2: no such device",
    ]
    assert case_row(spread, TWO, failed, "cpu")[5:] == ["4.00", "2.50 to 4.00", "", "2", ""]
    monkeypatch.setattr(scaling, "run", lambda case, plan, source=None, device=0: failed)
    out = tmp_path / "page.md"
    monkeypatch.setattr("sys.argv", ["scaling", "--out", str(out)])
    with pytest.raises(SystemExit) as left:
        scaling.main()
    assert left.value.code == 1
    text = out.read_text()
    assert text.count("failed: status 2: no such device") == 8
    assert text.count("failed: there is no checkpoint to take up") == 6


def test_runs_of_one_gpu_are_side_by_side_and_all_others_one_by_one(monkeypatch):
    asked = []

    def note(case, plan, *, source=None, device=0):
        asked.append((case.strategy, case.devices, device))
        return ONE

    monkeypatch.setattr(scaling, "run", note)
    cases = cases_of(MODULE, ["fsdp"], [1, 2], "cuda")
    assert list(scaling.timed(cases, PLAN._replace(accelerator="cuda"), 2)) == cases
    assert set(asked[:2]) == {(SINGLE, 1, 0), (UNCAPTURED, 1, 1)}
    assert asked[2:] == [("fsdp", 2, 0)] * 2


def test_links_are_named_as_nvidia_smi_names_them(monkeypatch):
    said = (
        "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\tPXB\t0-47\n"
        "GPU1\tNV18\t X \tSYS\t0-47\nNIC0\tPXB\tSYS\t X \n\nLegend:\n\n  X    = Self\n"
    )
    answer = SimpleNamespace(stdout=said)
    monkeypatch.setattr(scaling.subprocess, "run", lambda *args, **options: answer)
    assert scaling._links() == "NV18"


def test_what_a_process_said_last_is_why_it_failed(tmp_path):
    """And no process of a run outlives it: the other one would wait for a minute."""
    program = "import os, sys, time; rank = os.environ['LOCAL_RANK']; time.sleep(60 * (rank == '0'));"
    program += "sys.exit('ValueError: rank ' + rank)"
    script = tmp_path / "sh.py"
    script.write_text(program)
    said = call([sys.executable, str(script)], tmp_path / "log.txt", 2, PLAN)
    assert said == "status 1: ValueError: rank 1"
    late = call(["/bin/sleep", "60"], tmp_path / "log.txt", 1, PLAN._replace(timeout=0.3))
    assert late == "not done after 0 s"


def forked(command, log, devices, plan):
    """What `call` does for one process, without the imports."""
    assert command[:3] == [sys.executable, "-m", "lightning_modules.cli"]
    done = warm_python.run(None, command[3:])
    return done.stderr if done.returncode else ""


@pytest.mark.slow
def test_a_run_is_measured_and_taken_up(tmp_path, monkeypatch):
    plan = PLAN._replace(folder=tmp_path)
    alone = Case("MetaSeqClassifier", SINGLE, 1)
    begun = run(alone, plan)
    assert begun.error == ""
    assert len(begun.seconds) == 2
    assert list(begun.losses) == list(range(1, 9))
    assert begun.peak_bytes > 100 * 2**20
    monkeypatch.setattr(scaling_runs, "call", forked)
    again = run(alone, plan, source=alone)
    assert list(again.losses) == [7, 8]
    assert largest_difference(again.losses, begun.losses) == 0
    text = page(plan, {alone: begun}, {(alone, alone): again})
    assert "| MetaSeqClassifier | one device | 1 |  | 16 |" in text
    assert "| MetaSeqClassifier | one device | one device | 2 | 0.0e+00 |" in text
