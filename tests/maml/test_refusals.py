"""A layer that forbids its second derivative stops second-order learning, and nothing else does."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from theria.maml import meta_gradient
from theria.maml.refusals import raise_refusals

TASKS, BATCH, LENGTH, WIDTH, CLASSES = 2, 3, 4, 5, 2


class Once(Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].cos()


class Indifferent(Function):
    """sin(x), whose second argument takes no part; its gradient is none."""

    @staticmethod
    def forward(ctx, x, bystander):
        ctx.save_for_backward(x, bystander)
        return x.sin()

    @staticmethod
    def backward(ctx, cotangent):
        x, bystander = ctx.saved_tensors
        return IndifferentGradient.apply(cotangent * x.cos(), bystander), None


class IndifferentGradient(Function):
    @staticmethod
    def forward(ctx, gradient, bystander):
        return gradient.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent, None


class Model(nn.Module):
    """A classifier of the mean token; ``forward_stacked`` spares layers of the tests a vmap rule."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.first = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward_stacked(self, parameters, x):
        hidden = torch.baddbmm(
            parameters["first.bias"].unsqueeze(1), x.mean(2), parameters["first.weight"].mT
        )
        hidden = self.layer(hidden)
        return torch.baddbmm(parameters["head.bias"].unsqueeze(1), hidden, parameters["head.weight"].mT)


def full(layer, **options):
    torch.manual_seed(0)
    sets = [(torch.randn(TASKS, BATCH, LENGTH, WIDTH), torch.randint(CLASSES, (TASKS, BATCH))) for _ in "sq"]
    options = {"mode": "FULL", "inner_steps": 3, "inner_lr": 0.4, **options}
    return meta_gradient(Model(layer), *sets, **options).grads


@pytest.mark.parametrize("segment", [0, 2])
def test_full_raises_where_a_layer_is_once_differentiable(segment):
    with pytest.raises(RuntimeError, match="once_differentiable"):
        full(Once.apply, inner_checkpoint=segment)


@pytest.mark.parametrize("mode", ["FO", "FO_STRICT"])
def test_first_order_learns_through_it(mode):
    expected = full(torch.sin, mode=mode)
    for name, gradient in full(Once.apply, mode=mode).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("segment", [0, 2])
def test_leaves_of_the_models_own_are_no_refusal_and_get_no_gradient(segment):
    """A tensor that requires grad and is no parameter, once used and once not."""
    factor, bystander = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
    found = full(lambda x: Indifferent.apply(factor * x, bystander), inner_checkpoint=segment)
    expected = full(torch.sin, inner_checkpoint=segment)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert factor.grad is None
    assert bystander.grad is None


def test_only_what_requires_grad_is_asked():
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(Once.apply(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        raise_refusals((torch.ones(2), gradient), (x,))
    raise_refusals((torch.ones(2), x.sin()), (x,))
    raise_refusals((torch.ones(2), x.sin()), ())
