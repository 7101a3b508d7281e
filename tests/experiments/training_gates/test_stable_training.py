"""G2-4 passes for steps that are all there, finite and learning, and fails where one of these is not so."""

import math
import random

import pandas as pd
import pytest
import torch
from torch import nn

from experiments.training_gates.stable_training import stability_gate

STEPS = 50


def table(**changes: list[float]) -> pd.DataFrame:
    noise = random.Random(0)
    losses = [3 - 0.02 * step + noise.gauss(0, 0.05) for step in range(STEPS)]
    columns = {
        "step": list(range(1, STEPS + 1)),
        "attempt": [1] * STEPS,
        "loss": losses,
        "total_loss": losses,
        "grad_norm": [1.0] * STEPS,
    }
    return pd.DataFrame(columns | changes)


def gate(found: pd.DataFrame, model: nn.Module | None = None):
    return stability_gate(found, model or nn.Linear(2, 2), steps=STEPS, seconds=7.0)


def one_of(value: float, at: int = 20) -> list[float]:
    column = [1.0] * STEPS
    column[at] = value
    return column


def flat(seed: int) -> list[float]:
    noise = random.Random(seed)
    return [2 + noise.gauss(0, 0.5) for _ in range(STEPS)]


def test_it_passes_for_training_that_learns():
    found = gate(table())
    assert found.passed
    assert "50 of 50 steps in 7 s" in found.measured
    assert "loss 2.9" in found.measured


@pytest.mark.parametrize("column", ["loss", "total_loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_fails(column, value):
    found = table()
    found.loc[20, column] = value
    assert not gate(found).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_fail(value):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias[:1], value)
    found = gate(table(), model)
    assert "1 weights" in found.measured
    assert not found.passed


@pytest.mark.parametrize(
    "found",
    [
        table().iloc[:-1],
        table().drop(index=7),
        pd.concat([table(), table().iloc[-1:]]),
        pd.concat([table().drop(index=7), table().iloc[-1:]]),
        table(attempt=one_of(2.0, STEPS - 1)),
        table(loss=[2.0] * STEPS),
        table(loss=list(range(STEPS))),
        table(loss=flat(1)),
        table(loss=flat(2)),
    ],
    ids=[
        "too few",
        "a gap",
        "a duplicate",
        "a gap and a duplicate",
        "taken back",
        "no change",
        "a rise",
        "noise",
        "other noise",
    ],
)
def test_steps_that_are_missing_or_learn_nothing_fail(found):
    assert not gate(found).passed


def test_buffers_count_among_the_weights():
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(torch.nan)
    assert not gate(table(), model).passed
