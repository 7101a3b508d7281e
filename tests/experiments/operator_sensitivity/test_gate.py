"""Fused runs wait for the reference grid and for a task that tells modes apart."""

import dataclasses

import pytest

from experiments.operator_sensitivity.gate import CONDITIONS, REFERENCE_GRID, TASK_DIFFICULTY, judge

CLEAR, NONE = [0.1, 0.101, 0.099], [0.01, -0.012, 0.004]


@pytest.fixture
def deep(made):
    return dataclasses.replace(made.TINY, inner_steps=5)


@pytest.fixture
def gated(deep):
    return [
        dataclasses.replace(deep, backend="triton_fused", mode=m, seed=s, device="cuda")
        for m in ("FULL", "FO")
        for s in range(3)
    ]


def test_a_complete_grid_of_a_hard_enough_task_opens_it(made, gated, deep):
    verdict = judge(gated, made.table(made.pairs(CLEAR, deep)))
    assert verdict.opens
    text = "\n".join(verdict.lines())
    assert "OPEN" in text
    assert "6 of 6 reference runs succeeded on cpu" in text
    assert "FULL - FO = +0.1000" in text


def test_a_missing_run_closes_it(made, gated, deep):
    verdict = judge(gated, made.table(made.pairs(CLEAR, deep)[:-1]))
    assert not verdict.opens
    assert "5 of 6" in "\n".join(verdict.lines())
    assert f"--override-gate {REFERENCE_GRID}" in verdict.lines()[-1]


def test_a_failed_run_is_a_missing_run(made, gated, deep):
    rows = made.pairs(CLEAR, deep)
    rows[-1]["status"] = "FAILED"
    assert not judge(gated, made.table(rows)).opens


@pytest.mark.parametrize("change", [{"inner_lr": 0.3}, {"noise": 2.0}, {"variant": "detach_key"}])
def test_another_configuration_does_not_count(made, gated, deep, change):
    rows = made.pairs(CLEAR, dataclasses.replace(deep, **change))
    assert not judge(gated, made.table(rows)).opens


@pytest.mark.parametrize("gains", [NONE, [-g for g in CLEAR]])
def test_a_task_that_does_not_show_full_above_fo_closes_it(made, gated, deep, gains):
    verdict = judge(gated, made.table(made.pairs(gains, deep)))
    assert [c.met for c in verdict.conditions] == [True, False]
    assert not verdict.opens


def test_a_task_at_its_ceiling_closes_it(made, gated, deep):
    assert not judge(gated, made.table(made.pairs(CLEAR, deep, accuracy=0.85))).conditions[1].met


@pytest.mark.parametrize("accuracy", [0.3, 0.2])
def test_a_task_at_chance_closes_it(made, gated, deep, accuracy):
    """Of two classes; the best accuracy is 0.5 or below."""
    rows = made.pairs(CLEAR, deep, accuracy=accuracy)
    for row in rows:
        row["final_acc"] = min(row["final_acc"], 0.5 - row["seed"] / 100)
    own = made.table(rows)
    condition = judge(gated, own).conditions[1]
    assert "above zero" in "\n".join(condition.evidence)
    assert not condition.met


def test_one_inner_step_says_nothing_of_depth(made, gated, deep):
    """FULL is above FO in the shallow runs alone."""
    shallow = [dataclasses.replace(run, inner_steps=1) for run in gated]
    rows = [*made.pairs(CLEAR), *made.pairs(NONE, deep)]
    verdict = judge([*gated, *shallow], made.table(rows))
    assert [c.met for c in verdict.conditions] == [True, False]
    text = "\n".join(verdict.lines())
    assert "at some depth above k=1" in text
    assert "over 3 seeds, above zero, too shallow to count" in text
    assert not judge(shallow, made.table(made.pairs(CLEAR))).opens
    assert judge([*gated, *shallow], made.table([*made.pairs(NONE), *made.pairs(CLEAR, deep)])).opens


def test_overriding_names_what_is_overridden(made, gated, deep):
    table = made.table(made.pairs(NONE, deep)[:-1])
    assert not judge(gated, table, [REFERENCE_GRID]).opens
    verdict = judge(gated, table, [REFERENCE_GRID, TASK_DIFFICULTY])
    assert verdict.opens
    assert "\n".join(verdict.lines()).count("NOT MET, overridden") == len(CONDITIONS)


def test_nothing_done_is_closed(made, gated):
    assert not judge(gated, made.table([])).opens
