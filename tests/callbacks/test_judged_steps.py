"""What the loggers are told of steps: no spike between two rows is lost, and none is told twice."""

from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.judged_steps import JudgedSteps
from callbacks.perplexity_baseline import Judgement

EVERY, LAST = 5, 23
SPIKES = {1: 0.3, 7: 0.2, 8: 0.9, 9: 0.4, 15: 0.1, 16: 0.7, 22: 0.6}


def judged(step: int) -> Judgement:
    delta = SPIKES.get(step, -0.01)
    return Judgement(2.0, delta, 0.0, is_spike=step in SPIKES, is_outlier=False)


def told(steps: range, spike: float = 0.0) -> tuple[dict[int, float], dict[int, float]]:
    """By step, what the loggers get of these steps, and what a checkpoint would keep."""
    rows: dict[int, float] = {}
    kept = {}
    judge = JudgedSteps()
    judge.every, judge.spike = EVERY, spike
    for step in steps:

        def log(values: dict[str, float], step: int) -> None:
            rows[step + 1] = values["rollback/spike"]

        loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=step))
        trainer: Any = SimpleNamespace(loggers=[SimpleNamespace(log_metrics=log)], fit_loop=loop)
        judge.add(step, judged(step), 0)
        kept[step] = judge.spike
        judge.log(trainer, 0)
    return rows, kept


def test_a_row_has_the_largest_spike_since_the_last() -> None:
    rows, _ = told(range(1, LAST + 1))
    assert rows == {5: 0.3, 10: 0.9, 15: 0.1, 20: 0.7}


@pytest.mark.parametrize("saved", range(1, LAST))
def test_rows_behind_a_checkpoint_are_the_same_after_a_resume(saved: int) -> None:
    whole, kept = told(range(1, LAST + 1))
    resumed, _ = told(range(saved + 1, LAST + 1), kept[saved])
    assert resumed == {step: spike for step, spike in whole.items() if step > saved}
