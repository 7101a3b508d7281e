"""The risk checks pass here, and would not pass what they are there to catch."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from experiments.operator_sensitivity import risk_checks
from experiments.operator_sensitivity.risk_checks import (
    Check,
    determinism,
    maximum,
    parity,
    resumed_grid,
    resumed_training,
)
from theria.attention import scaled_dot_product_attention

pytestmark = [
    # what Lightning has to say about a trainer without workers
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # numpy's, inside Triton's interpreter
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning"),
]


@pytest.mark.parametrize(
    ("figure", "limit", "verdict"),
    [
        (0.0, 0.0, "PASS"),
        (1e-30, 0.0, "FAIL"),
        (1e-5, 1e-5, "PASS"),
        (2.29e-4, 1e-4, "WARN"),
        (2.29e-4, 1e-5, "FAIL"),
        (float("nan"), 1e-5, "FAIL"),
    ],
)
def test_verdicts(figure, limit, verdict):
    assert Check("it", figure, limit).verdict == verdict


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_largest_of_numbers_with_a_nan_is_nan(place):
    values = [0.0, 1.0, 2.0]
    assert maximum(values) == 2.0
    values[place] = math.nan
    assert math.isnan(maximum(iter(values)))


def test_not_a_number_in_any_curve_fails(made, monkeypatch):
    """Even one that is not the first that is looked at."""
    found = iter([np.zeros(3), np.array([0.0, math.nan, 0.0])])
    monkeypatch.setattr(risk_checks, "train", lambda run: ({}, {"loss": np.zeros(3), "norm": next(found)}))
    (check,) = determinism(made.TINY)
    assert check.verdict == "FAIL"


def test_not_a_number_in_a_derivative_fails(monkeypatch):
    """In the gradient by the key alone, which is the second of three."""
    derivatives = risk_checks._derivatives

    def spoilt(backend, shape, device):
        forward, first, second = derivatives("reference", shape, device)
        if backend == "triton_fused":
            first[1] = torch.full_like(first[1], math.nan)
        return forward, first, second

    monkeypatch.setattr(risk_checks, "_derivatives", spoilt)
    found = {check.name: check for check in itertools.islice(parity("cpu"), 6)}
    assert math.isnan(found["parity, first order: largest absolute error"].figure)
    verdicts = [check.verdict for check in found.values()]
    assert verdicts == ["PASS", "PASS", "FAIL", "FAIL", "PASS", "PASS"]


def test_not_a_number_after_resuming_fails(made, monkeypatch):
    fit = risk_checks.fit

    def spoilt(*arguments, ckpt_path=None, **options):
        module, rows = fit(*arguments, ckpt_path=ckpt_path, **options)
        if ckpt_path:
            rows[-1]["loss"] = math.nan
            torch.nn.init.constant_(list(module.parameters())[-1], math.nan)
        return module, rows

    monkeypatch.setattr(risk_checks, "fit", spoilt)
    found = list(resumed_training(dataclasses.replace(made.TINY, outer_steps=6)))
    assert [check.verdict for check in found] == ["FAIL", "FAIL"]


def test_a_repeated_run_is_the_same(made):
    (check,) = determinism(made.TINY)
    assert check.verdict == "PASS"


def test_a_run_that_is_not_deterministic_fails(made, monkeypatch):
    calls = iter(range(2))
    train = risk_checks.train
    monkeypatch.setattr(risk_checks, "train", lambda run: train(dataclasses.replace(run, seed=next(calls))))
    (check,) = determinism(made.TINY)
    assert check.verdict == "FAIL"


def test_resumed_training_is_the_uninterrupted_one(made):
    found = list(resumed_training(dataclasses.replace(made.TINY, outer_steps=6)))
    assert [check.verdict for check in found] == ["PASS", "PASS"]


def test_training_that_starts_again_instead_fails(made, monkeypatch):
    fit = risk_checks.fit
    monkeypatch.setattr(risk_checks, "fit", lambda *a, ckpt_path=None, **options: fit(*a, **options))
    with pytest.raises(ValueError, match="zip"):
        list(resumed_training(dataclasses.replace(made.TINY, outer_steps=6)))


def test_a_resumed_grid_has_the_same_rows(made):
    assert [check.verdict for check in resumed_grid(made.TINY)] == ["PASS", "PASS"]


def test_the_kernels_agree_with_the_reference():
    found = list(parity("cuda" if torch.cuda.is_available() else "cpu"))
    assert len(found) == 7
    assert {check.verdict for check in found} == {"PASS"}


def test_kernels_with_reduced_precision_do_not(monkeypatch):
    def attention(query, key, value, *, backend):
        if backend == "triton_fused":
            query = query + 3e-4
        return scaled_dot_product_attention(query, key, value, backend="reference")

    monkeypatch.setattr(risk_checks, "scaled_dot_product_attention", attention)
    forward = [check for check in parity("cpu") if "forward" in check.name]
    assert {check.verdict for check in forward} <= {"FAIL", "WARN"}
