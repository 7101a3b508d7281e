"""Adaptation curves against a plain loop, and what they leave behind."""

import gc

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from theria.maml import adaptation_curve
from theria.models.seq_classifier import SeqClassifier

LR, STEPS = 0.4, 3


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = SeqClassifier(4, 3, backend="reference").double()
    support = (torch.randn(3, 5, 6, 4, dtype=torch.float64), torch.randint(3, (3, 5)))
    query = (torch.randn(3, 7, 6, 4, dtype=torch.float64), torch.randint(3, (3, 7)))
    return model, support, query


def test_curve_equals_a_plain_loop(case):
    model, support, query = case
    curve = adaptation_curve(model, support, query, inner_steps=STEPS, inner_lr=LR)
    for task, (x, y, query_x, query_y) in enumerate(zip(*support, *query, strict=True)):
        parameters = dict(model.named_parameters())
        for step in range(STEPS + 1):
            loss = F.cross_entropy(functional_call(model, parameters, (x,)), y)
            logits = functional_call(model, parameters, (query_x,))
            torch.testing.assert_close(curve.support_loss[step, task], loss.detach())
            torch.testing.assert_close(
                curve.query_loss[step, task], F.cross_entropy(logits, query_y).detach()
            )
            expected = (logits.argmax(-1) == query_y).double().mean()
            torch.testing.assert_close(curve.query_accuracy[step, task], expected)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            parameters = {n: p - LR * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}


@pytest.fixture
def _from_now_on():
    """What stands already is not looked at: after many tests it takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_from_now_on")
def test_nothing_of_the_loop_outlives_the_call(case):
    def live_tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    curve = adaptation_curve(*case, inner_steps=STEPS, inner_lr=LR)
    before = live_tensors()
    assert before >= 3
    for _ in range(5):
        curve = adaptation_curve(*case, inner_steps=STEPS, inner_lr=LR)
    assert live_tensors() == before
    assert curve.query_loss.grad_fn is None
    assert curve.support_loss.grad_fn is None


def test_shapes_and_counts_are_checked(case):
    model, support, query = case
    with pytest.raises(ValueError, match="inner_steps must be at least 0, got -1"):
        adaptation_curve(model, support, query, inner_steps=-1, inner_lr=LR)
    with pytest.raises(ValueError, match="support expects"):
        adaptation_curve(model, (support[0], support[1][0]), query, inner_steps=1, inner_lr=LR)
