"""G2-7 passes for the records of the code that judges, and fails for records it would not have written."""

import math
import random

import pandas as pd
import pytest

from callbacks.perplexity_baseline import PerplexityBaseline
from experiments.training_gates.telemetry import telemetry_gate

STEPS = 150
SPAN = 20


def losses() -> list[float]:
    """Falling and noisy, with an outlier, a loss whose perplexity has no float, and a usual spike."""
    noise = random.Random(0)
    found = [4 - 0.01 * step + noise.gauss(0, 0.04) for step in range(STEPS)]
    found[60], found[61], found[90] = 9.0, 30.0, found[90] + 0.1
    return found


def records(**settings: int) -> pd.DataFrame:
    baseline = PerplexityBaseline(**({"steps": SPAN, "warm_up": SPAN} | settings))
    found = losses()
    judged = [baseline.judge(loss) for loss in found]
    return pd.DataFrame(
        {
            "step": range(1, STEPS + 1),
            "total_loss": found,
            "ppl_delta": [judgement.ppl_delta for judgement in judged],
            "is_spike": [float(judgement.is_spike) for judgement in judged],
        }
    )


def gate(table: pd.DataFrame):
    return telemetry_gate(table, steps=STEPS, loss="total_loss", threshold=0.05, baseline_steps=SPAN)


def test_it_passes_for_what_the_baseline_judged():
    found = gate(records())
    assert found.passed, found
    assert "150 of 150 records have it" in found.measured
    assert "2 of them not taken up" in found.measured


def changed(column: str, row: int, value: float) -> pd.DataFrame:
    table = records()
    table.loc[row, column] = value
    return table


def shifted() -> pd.DataFrame:
    table = records()
    return table.assign(ppl_delta=table["ppl_delta"].shift(1, fill_value=0.0))


@pytest.mark.parametrize(
    "table",
    [
        records().drop(columns="ppl_delta"),
        records().drop(columns="is_spike"),
        changed("ppl_delta", 70, math.nan),
        changed("ppl_delta", 70, math.inf),
        changed("ppl_delta", 0, 0.5),
        changed("ppl_delta", STEPS - 1, records()["ppl_delta"].iloc[-1] + 1e-4),
        changed("total_loss", 70, 3.0),
        changed("total_loss", 70, math.nan),
        records().assign(ppl_delta=0.0),
        shifted(),
        records().iloc[1:],
        records().drop(index=[149]),
        records(steps=SPAN + 1),
        changed("is_spike", 60, 0.0),
        changed("is_spike", 10, 1.0),
        records().assign(is_spike=1.0),
    ],
    ids=[
        "not visible",
        "no flag",
        "not a number",
        "not finite",
        "something before the first step",
        "a little off",
        "of another loss",
        "no loss to recompute from",
        "always zero",
        "of the step before",
        "the first step missing",
        "the last step missing",
        "of another baseline",
        "a spike not flagged",
        "a flag without a spike",
        "all flagged",
    ],
)
def test_it_fails_for_anything_else(table):
    assert not gate(table).passed


def test_a_baseline_that_absorbs_nothing_fails(monkeypatch):
    monkeypatch.setattr(PerplexityBaseline, "_absorb", lambda self, *numbers: None)
    assert not gate(records()).passed
