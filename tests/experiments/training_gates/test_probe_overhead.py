"""G2-2 passes for a probe that costs less than the limit at a frequency that was decided."""

import pytest

from experiments.training_gates.niah_frequency import Cost
from experiments.training_gates.probe_overhead import locked_in, overhead_gate
from theria.memory.needle import Mean

PAGE = "Limit 1%, aim 0.2%. Locked: **every 1000 steps**.\n"


def cost(probe: float, *, high: float | None = None, step: float = 0.1) -> Cost:
    """Of a probe of so many seconds, the upper end of its interval at ``high``."""
    steps = Mean(probe / step, 0.0, (probe if high is None else high) / step)
    return Cost(steps, Mean(probe, probe, probe), Mean(step, step, step), 0.0)


def test_the_page_of_a_decision_is_read():
    assert locked_in(PAGE + PAGE.replace("1000", "10,000")) == [1000, 10_000]


@pytest.mark.parametrize("configured", [1000, 2000])
def test_it_passes_below_the_limit(configured):
    gate = overhead_gate(PAGE, cost(0.5, high=0.9), configured=configured)
    assert gate.passed
    assert f"every {configured} steps" in gate.measured


def test_it_says_what_was_measured():
    gate = overhead_gate(PAGE, cost(0.5, high=0.9), configured=1000)
    assert "a probe takes 500 ms and a step 100 ms, an overhead of 0.500%, at most 0.900%" in gate.measured


@pytest.mark.parametrize(
    ("page", "found", "configured"),
    [
        ("", cost(0.5), 1000),
        (PAGE, cost(0.5), 999),
        (PAGE, cost(1.01), 1000),
        (PAGE, cost(0.5, high=1.01), 1000),
        (PAGE, cost(0.5, step=0.04), 1000),
        (PAGE, cost(0.5, high=float("inf")), 1000),
        (PAGE, cost(float("nan")), 1000),
        (PAGE, cost(0.0), 1000),
    ],
    ids=[
        "no decision",
        "more often than decided",
        "above the limit",
        "perhaps above the limit",
        "steps are short",
        "too few probes",
        "not a number",
        "nothing was probed",
    ],
)
def test_it_fails_otherwise(page, found, configured):
    assert not overhead_gate(page, found, configured=configured).passed
