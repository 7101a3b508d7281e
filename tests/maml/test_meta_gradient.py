"""The meta-gradient against finite differences, a plain loop, hand-computed curvature and itself."""

import copy
import itertools
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from theria.maml import MetaMode, meta_gradient
from theria.models.seq_classifier import SeqClassifier

TASKS, BATCH, LENGTH, WIDTH, CLASSES = 3, 4, 5, 4, 3
LR = 0.4


@pytest.fixture
def model() -> SeqClassifier:
    torch.manual_seed(0)
    return SeqClassifier(WIDTH, CLASSES, backend="reference").double()


@pytest.fixture
def tasks() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=generator)
        return x, torch.randint(CLASSES, (TASKS, BATCH), generator=generator)

    return draw(), draw()


def adapt_one_task(
    model: nn.Module,
    parameters: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    steps: int,
    *,
    names=None,
    lr=LR,
    graph=True,
) -> dict[str, Tensor]:
    """The inner loop as the textbook writes it, for a single task."""
    parameters = dict(parameters)
    names = list(parameters) if names is None else names
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(model, parameters, (x,)), y)
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names], create_graph=graph)
        for name, gradient in zip(names, gradients, strict=True):
            parameters[name] = parameters[name] - lr * gradient
    return parameters


def looped_meta_loss(model: nn.Module, support, query, steps: int, **options) -> Tensor:
    """Mean query loss over tasks, one task after the other."""
    initial = dict(model.named_parameters())
    losses = []
    for x, y, query_x, query_y in zip(*support, *query, strict=True):
        adapted = adapt_one_task(model, initial, x, y, steps, **options)
        losses.append(F.cross_entropy(functional_call(model, adapted, (query_x,)), query_y))
    return torch.stack(losses).mean()


def looped_gradient(model: nn.Module, support, query, steps: int, **options) -> dict[str, Tensor]:
    loss = looped_meta_loss(model, support, query, steps, **options)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def finite_differences(model: nn.Module, loss_at, step: float = 1e-5) -> dict[str, Tensor]:
    """Central differences of ``loss_at(model)`` in every coordinate of every parameter."""
    probe = copy.deepcopy(model)
    gradients = {}
    for name, parameter in probe.named_parameters():
        flat, gradient = parameter.data.view(-1), torch.zeros(parameter.numel(), dtype=parameter.dtype)
        for i in range(parameter.numel()):
            centre = flat[i].item()
            flat[i] = centre + step
            above = loss_at(probe).detach().item()
            flat[i] = centre - step
            gradient[i] = (above - loss_at(probe).detach().item()) / (2 * step)
            flat[i] = centre
        gradients[name] = gradient.view_as(parameter)
    return gradients


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    flat_a, flat_b = (torch.cat([g[name].flatten() for name in a]) for g in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


FULL_WAYS = [
    pytest.param({"strategy": "unrolled"}, id="unrolled"),
    pytest.param({"strategy": "unrolled", "inner_checkpoint": 1}, id="segments of 1"),
    pytest.param({"strategy": "unrolled", "inner_checkpoint": 2}, id="segments of 2"),
    pytest.param({"strategy": "unrolled", "inner_checkpoint": 9}, id="one long segment"),
    pytest.param({"strategy": "sweep"}, id="sweep"),
]


@pytest.mark.parametrize("way", FULL_WAYS)
def test_full_is_the_derivative_of_the_whole_procedure(model, tasks, way):
    support, query = tasks
    expected = finite_differences(model, lambda m: looped_meta_loss(m, support, query, steps=3))
    result = meta_gradient(model, support, query, mode="FULL", inner_steps=3, inner_lr=LR, **way)
    assert relative_difference(result.grads, expected) < 1e-8


@pytest.mark.parametrize("way", FULL_WAYS)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_full_equals_a_plain_loop_over_tasks(model, tasks, way, steps):
    support, query = tasks
    result = meta_gradient(model, support, query, mode=MetaMode.FULL, inner_steps=steps, inner_lr=LR, **way)
    assert relative_difference(result.grads, looped_gradient(model, support, query, steps)) < 1e-13
    torch.testing.assert_close(result.loss, looped_meta_loss(model, support, query, steps).detach())


@pytest.mark.parametrize("strategy", ["unrolled", "sweep"])
@pytest.mark.parametrize("mode", ["FO", "FO_STRICT"])
def test_first_order_modes_equal_a_plain_loop_and_each_other(model, tasks, mode, strategy):
    support, query = tasks
    result = meta_gradient(
        model, support, query, mode=mode, inner_steps=4, inner_lr=LR, strategy=strategy, diagnostics=True
    )
    assert relative_difference(result.grads, looped_gradient(model, support, query, 4, graph=False)) < 1e-14


def test_full_differs_from_first_order_by_the_curvature_computed_by_hand(model, tasks):
    support, query = tasks
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss_of(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return F.cross_entropy(functional_call(model, dict(zip(names, parts, strict=True)), (x,)), y)

    correction = torch.zeros_like(theta)
    for x, y, query_x, query_y in zip(*support, *query, strict=True):
        gradient = torch.autograd.functional.jacobian(lambda t, x=x, y=y: loss_of(t, x, y), theta)
        hessian = torch.autograd.functional.hessian(lambda t, x=x, y=y: loss_of(t, x, y), theta)
        outer = torch.autograd.functional.jacobian(
            lambda t, x=query_x, y=query_y: loss_of(t, x, y), theta - LR * gradient
        )
        correction -= LR * hessian @ outer / TASKS
    options = {"inner_steps": 1, "inner_lr": LR}
    full = meta_gradient(model, support, query, mode="FULL", **options).grads
    first_order = meta_gradient(model, support, query, mode="FO", **options).grads
    difference = torch.cat([(full[name] - first_order[name]).flatten() for name in names])
    assert correction.norm() > 0.05 * torch.cat([g.flatten() for g in full.values()]).norm()
    torch.testing.assert_close(difference, correction, rtol=1e-12, atol=1e-15)


class _CountedIdentity(torch.autograd.Function):
    """Identity that notes, at each backward, which forward it belongs to."""

    generate_vmap_rule = True
    forwards = itertools.count()
    backwards: ClassVar[list[int]] = []

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.number = next(_CountedIdentity.forwards)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        _CountedIdentity.backwards.append(ctx.number)
        return grad * 1


class _Counted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return _CountedIdentity.apply(self.model(x))


@pytest.mark.parametrize(("mode", "expected"), [("FO_STRICT", [0, 1, 2, 3]), ("FULL", [0, 1, 2, 3, 2, 1, 0])])
def test_strict_first_order_never_goes_back_through_the_inner_loop(model, tasks, mode, expected):
    """Three inner forwards and the query's; FULL walks back through the inner three, FO_STRICT must not."""
    _CountedIdentity.forwards, _CountedIdentity.backwards = itertools.count(), []
    meta_gradient(_Counted(model), *tasks, mode=mode, inner_steps=3, inner_lr=LR)
    assert _CountedIdentity.backwards == expected


class _Leaky(torch.autograd.Function):
    """x^3 whose gradient keeps a graph to x though nobody asked for one: accidental curvature."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            return grad * 3 * x**2


def test_accidental_curvature_shows_as_a_difference_of_the_first_order_modes(model, tasks):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((CLASSES, WIDTH), 0.7, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0] @ _Leaky.apply(self.weight).mT

    options = {"inner_steps": 2, "inner_lr": LR}
    leaky = Model()
    first_order = meta_gradient(leaky, *tasks, mode="FO", **options).grads
    strict = meta_gradient(leaky, *tasks, mode="FO_STRICT", **options).grads
    assert relative_difference(first_order, strict) > 1e-2


@pytest.mark.parametrize("way", FULL_WAYS)
def test_parameters_left_out_of_the_inner_loop_keep_the_mixed_term(model, tasks, way):
    support, query = tasks
    names = ["head.weight", "head.bias"]
    expected = finite_differences(model, lambda m: looped_meta_loss(m, support, query, steps=3, names=names))
    options = {"inner_steps": 3, "inner_lr": LR, "adapt": ["head"]}
    result = meta_gradient(model, support, query, mode="FULL", **options, **way)
    assert relative_difference(result.grads, expected) < 1e-8
    first_order = meta_gradient(model, support, query, mode="FO", **options)
    assert relative_difference(first_order.grads, expected) > 1e-2


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_a_learned_inner_rate_gets_its_derivative(model, tasks, checkpoint):
    rate = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    result = meta_gradient(
        model, *tasks, mode="FULL", inner_steps=3, inner_lr=rate, inner_checkpoint=checkpoint
    )
    step = 1e-5
    above, below = (
        looped_meta_loss(model, *tasks, steps=3, lr=LR + d).detach().item() for d in (step, -step)
    )
    assert result.inner_lr_grad.item() == pytest.approx((above - below) / (2 * step), rel=1e-8)
    assert rate.grad is None


def test_the_rate_of_first_order_gets_the_derivative_of_its_own_steps(model, tasks):
    """With the inner gradients held constant, theta_K = theta_0 - alpha sum g_k."""
    rate = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    result = meta_gradient(model, *tasks, mode="FO", inner_steps=3, inner_lr=rate)
    expected = torch.zeros((), dtype=torch.float64)
    initial = dict(model.named_parameters())
    for x, y, query_x, query_y in zip(*tasks[0], *tasks[1], strict=True):
        moved = adapt_one_task(model, initial, x, y, 3, graph=False)
        direction = [(initial[name] - moved[name]).detach() / LR for name in initial]
        loss = F.cross_entropy(functional_call(model, moved, (query_x,)), query_y)
        gradients = torch.autograd.grad(loss, list(moved.values()))
        expected -= sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)) / TASKS
    assert result.inner_lr_grad.item() == pytest.approx(expected.item(), rel=1e-12)


def test_without_steps_the_rate_has_no_influence(model, tasks):
    rate = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    assert meta_gradient(model, *tasks, mode="FULL", inner_steps=0, inner_lr=rate).inner_lr_grad == 0


@pytest.mark.parametrize("way", [{"mode": "FO_STRICT"}, {"mode": "FULL", "strategy": "sweep"}])
def test_a_learned_inner_rate_is_refused_where_it_would_be_wrong(model, tasks, way):
    rate = torch.tensor(LR, requires_grad=True)
    with pytest.raises(ValueError, match="learned inner_lr"):
        meta_gradient(model, *tasks, inner_steps=1, inner_lr=rate, **way)


def test_frozen_parameters_are_constants(model, tasks):
    model.q_proj.weight.requires_grad_(False)
    result = meta_gradient(model, *tasks, mode="FULL", inner_steps=2, inner_lr=LR)
    assert "q_proj.weight" not in result.grads
    names = list(result.grads)
    expected = looped_gradient_of(model, tasks, names, steps=2)
    assert relative_difference(result.grads, expected) < 1e-13


def looped_gradient_of(model, tasks, names, steps):
    loss = looped_meta_loss(model, *tasks, steps=steps, names=names)
    return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True))


def test_the_model_is_not_touched(model, tasks):
    before = copy.deepcopy(model.state_dict())
    for mode, strategy in itertools.product(MetaMode, ["unrolled", "sweep"]):
        meta_gradient(
            model, *tasks, mode=mode, inner_steps=2, inner_lr=LR, strategy=strategy, diagnostics=True
        )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_reported_values_are_those_of_the_loop(model, tasks):
    support, query = tasks
    steps = 3
    result = meta_gradient(
        model, support, query, mode="FULL", inner_steps=steps, inner_lr=LR, diagnostics=True
    )
    initial = dict(model.named_parameters())
    rows = []
    for x, y, query_x, query_y in zip(*support, *query, strict=True):
        adapted = adapt_one_task(model, initial, x, y, steps)
        rows.append(
            [
                (functional_call(model, adapted, (query_x,)).argmax(-1) == query_y).double().mean(),
                F.cross_entropy(model(x), y),
                F.cross_entropy(functional_call(model, adapted, (x,)), y),
                (model(query_x).argmax(-1) == query_y).double().mean(),
            ]
        )
    expected = torch.stack([torch.stack(row) for row in rows]).detach().mean(0)
    reported = [
        result.query_accuracy,
        result.support_loss_before,
        result.support_loss_after,
        result.query_accuracy_before,
    ]
    torch.testing.assert_close(torch.stack(reported), expected)


def test_single_precision_agrees_with_double_within_rounding(model, tasks):
    expected = meta_gradient(model, *tasks, mode="FULL", inner_steps=5, inner_lr=LR).grads
    single = [(x.float(), y) for x, y in tasks]
    for way in ({}, {"strategy": "sweep"}, {"inner_checkpoint": 2}):
        result = meta_gradient(model.float(), *single, mode="FULL", inner_steps=5, inner_lr=LR, **way).grads
        assert relative_difference({n: g.double() for n, g in result.items()}, expected) < 2e-6
        model.double()


def test_gradients_are_computed_inside_no_grad(model, tasks):
    expected = meta_gradient(model, *tasks, mode="FULL", inner_steps=2, inner_lr=LR).grads
    with torch.no_grad():
        result = meta_gradient(model, *tasks, mode="FULL", inner_steps=2, inner_lr=LR).grads
    assert relative_difference(result, expected) == 0


@pytest.mark.parametrize("strategy", ["unrolled", "sweep"])
def test_a_cut_graph_raises_instead_of_answering_zero(model, tasks, strategy):
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.head(x[:, 0].detach() + 0.0)

    with pytest.raises(RuntimeError, match="not have been used"):
        meta_gradient(Cut(), *tasks, mode="FULL", inner_steps=1, inner_lr=LR, strategy=strategy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "SECOND"}, "MetaMode 'SECOND' is not one of FULL, FO, FO_STRICT"),
        ({"strategy": "backwards"}, "Strategy 'backwards'"),
        ({"inner_steps": -1}, "inner_steps .* got -1"),
        ({"inner_checkpoint": -2}, "inner_checkpoint"),
        ({"inner_checkpoint": 2, "mode": "FO"}, "unrolled FO keeps no such graph"),
        ({"inner_checkpoint": 2, "strategy": "sweep"}, "sweep FULL keeps no such graph"),
        ({"inner_lr": float("nan")}, "inner_lr must be a finite number"),
        ({"inner_lr": -0.1}, "inner_lr"),
        ({"adapt": ["tail"]}, "adapt names 'tail'"),
        ({"adapt": []}, "adapt is empty"),
        ({"inner_lr": torch.ones(3)}, r"one floating-point number, got torch.float32 of shape \(3,\)"),
        ({"inner_lr": torch.tensor(1)}, "one floating-point number, got torch.int64"),
    ],
)
def test_impossible_options_are_named(model, tasks, change, message):
    options = {"mode": "FULL", "inner_steps": 1, "inner_lr": LR} | change
    with pytest.raises(ValueError, match=message):
        meta_gradient(model, *tasks, **options)


def test_shapes_that_do_not_fit_are_named(model, tasks):
    support, query = tasks
    options = {"mode": "FULL", "inner_steps": 1, "inner_lr": LR}
    with pytest.raises(ValueError, match=r"query expects x .* got x \(3, 4, 5, 4\) and y \(3, 3\)"):
        meta_gradient(model, support, (query[0], query[1][:, :3]), **options)
    with pytest.raises(ValueError, match="support has 3 tasks, query has 2"):
        meta_gradient(model, support, (query[0][:2], query[1][:2]), **options)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(ValueError, match=r"class labels y of torch\.int64"):
            meta_gradient(model, support, (query[0], query[1].to(dtype)), **options)
    with pytest.raises(IndexError, match="-100 is out of bounds"):
        meta_gradient(model, support, (query[0], query[1] - 100 - query[1]), **options)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        meta_gradient(model.requires_grad_(False), support, query, **options)


def test_a_module_under_two_names_is_refused_and_a_parameter_under_two_is_exact(tasks):
    class Shared(nn.Module):
        def __init__(self, alias: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(WIDTH, WIDTH, bias=False)
            self.second = self.first if alias else nn.Linear(WIDTH, WIDTH, bias=False)
            self.second.weight = self.first.weight
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x[:, 0]).tanh()))

    with pytest.raises(ValueError, match="second and first are one module"):
        meta_gradient(Shared(alias=True), *tasks, mode="FULL", inner_steps=1, inner_lr=LR)
    tied = Shared(alias=False).double()
    result = meta_gradient(tied, *tasks, mode="FULL", inner_steps=2, inner_lr=LR)
    assert relative_difference(result.grads, looped_gradient(tied, *tasks, 2)) < 1e-13


def test_losses_of_a_half_precision_model_stay_in_range():
    torch.manual_seed(0)
    model = SeqClassifier(8, 3, backend="reference").half()
    support = torch.randn(256, 256, 2, 8).half(), torch.randint(3, (256, 256))
    result = meta_gradient(model, support, support, mode="FO", inner_steps=1, inner_lr=LR)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(result.support_loss_before)
