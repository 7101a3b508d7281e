"""Fused runs wait for the reference grid and for a task that tells modes apart."""

import dataclasses

import pytest

from experiments.operator_sensitivity.gate import CONDITIONS, REFERENCE_GRID, TASK_DIFFICULTY, judge

CLEAR, NONE = [0.1, 0.101, 0.099], [0.01, -0.012, 0.004]


@pytest.fixture
def gated(made):
    return [
        dataclasses.replace(made.TINY, backend="triton_fused", mode=m, seed=s, device="cuda")
        for m in ("FULL", "FO")
        for s in range(3)
    ]


def test_a_complete_grid_of_a_hard_enough_task_opens_it(made, gated):
    verdict = judge(gated, made.table(made.pairs(CLEAR)))
    assert verdict.opens
    text = "\n".join(verdict.lines())
    assert "OPEN" in text
    assert "6 of 6 reference runs succeeded on cpu" in text
    assert "FULL - FO = +0.1000" in text


def test_a_missing_run_closes_it(made, gated):
    verdict = judge(gated, made.table(made.pairs(CLEAR)[:-1]))
    assert not verdict.opens
    assert "5 of 6" in "\n".join(verdict.lines())
    assert f"--override-gate {REFERENCE_GRID}" in verdict.lines()[-1]


def test_a_failed_run_is_a_missing_run(made, gated):
    rows = made.pairs(CLEAR)
    rows[-1]["status"] = "FAILED"
    assert not judge(gated, made.table(rows)).opens


@pytest.mark.parametrize("change", [{"inner_lr": 0.3}, {"noise": 2.0}, {"variant": "detach_key"}])
def test_another_configuration_does_not_count(made, gated, change):
    rows = made.pairs(CLEAR, dataclasses.replace(made.TINY, **change))
    assert not judge(gated, made.table(rows)).opens


@pytest.mark.parametrize("gains", [NONE, [-g for g in CLEAR]])
def test_a_task_that_does_not_show_full_above_fo_closes_it(made, gated, gains):
    verdict = judge(gated, made.table(made.pairs(gains)))
    assert [c.met for c in verdict.conditions] == [True, False]
    assert not verdict.opens


def test_a_task_at_its_ceiling_closes_it(made, gated):
    assert not judge(gated, made.table(made.pairs(CLEAR, accuracy=0.85))).conditions[1].met


def test_overriding_names_what_is_overridden(made, gated):
    table = made.table(made.pairs(NONE)[:-1])
    assert not judge(gated, table, [REFERENCE_GRID]).opens
    verdict = judge(gated, table, [REFERENCE_GRID, TASK_DIFFICULTY])
    assert verdict.opens
    assert "\n".join(verdict.lines()).count("NOT MET, overridden") == len(CONDITIONS)


def test_nothing_done_is_closed(made, gated):
    assert not judge(gated, made.table([])).opens
