"""The risk checks pass here, and would not pass what they are there to catch."""

import dataclasses

import pytest
import torch

from experiments.operator_sensitivity import risk_checks
from experiments.operator_sensitivity.risk_checks import (
    Check,
    determinism,
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
