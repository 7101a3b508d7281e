import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jvp, vmap
from torch.func import grad as func_grad

from theria.attention import registered_backend, scaled_dot_product_attention
from theria.models.seq_classifier import SeqClassifier

TASKS, BATCH, LENGTH, WIDTH, CLASSES = 3, 4, 6, 8, 5
FORMS = pytest.mark.parametrize("absorb", [False, True], ids=["projected", "absorbed"])


def classifier(absorb=False, seed=0, width=WIDTH, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return SeqClassifier(width, CLASSES, absorb_projections=absorb, **options).to(dtype)


def sequences(*leading, seed=0, width=WIDTH, length=LENGTH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, length, width, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, leading, generator=generator)


def stacked_parameters(tasks=TASKS, **options):
    models = [classifier(seed=seed, **options) for seed in range(tasks)]
    named = [dict(model.named_parameters()) for model in models]
    return {name: torch.stack([each[name].detach() for each in named]) for name in named[0]}


def by_hand(p, x):
    """The logits of one sequence, token by token."""
    query = p["q_proj.weight"] @ x[0]
    scores = [query @ (p["k_proj.weight"] @ token) / math.sqrt(x.shape[-1]) for token in x]
    weights = [score.exp() for score in scores]
    read = sum(
        weight / sum(weights) * (p["v_proj.weight"] @ token) for weight, token in zip(weights, x, strict=True)
    )
    return p["head.weight"] @ read + p["head.bias"]


def test_parameters():
    shapes = {name: tuple(p.shape) for name, p in SeqClassifier(8, 5).named_parameters()}
    assert shapes == {
        "q_proj.weight": (8, 8),
        "k_proj.weight": (8, 8),
        "v_proj.weight": (8, 8),
        "head.weight": (5, 8),
        "head.bias": (5,),
    }


@FORMS
def test_logits_by_hand(absorb):
    model = classifier(absorb)
    x, _ = sequences(BATCH)
    expected = torch.stack([by_hand(dict(model.named_parameters()), each) for each in x])
    torch.testing.assert_close(model(x), expected)


@FORMS
def test_only_the_first_token_asks(absorb):
    model = classifier(absorb)
    x, _ = sequences(BATCH)
    torch.testing.assert_close(model(x[:, [0, 3, 5, 1, 2, 4]]), model(x))
    assert (model(x[:, [3, 0, 5, 1, 2, 4]]) - model(x)).abs().max() > 1e-3


def curvature(model, x, y):
    """Logits, gradients, and the Hessian-vector product along a fixed direction, by double backward."""
    parameters = list(model.parameters())
    logits = model(x)
    gradients = torch.autograd.grad(F.cross_entropy(logits, y), parameters, create_graph=True)
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in parameters]
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    return [logits, *gradients, *torch.autograd.grad(along, parameters)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_absorbed_form_is_the_same_function_with_the_same_derivatives(dtype, tolerance):
    x, y = sequences(16, width=64, length=32, dtype=dtype)
    plain, absorbed = (classifier(absorb, width=64, dtype=dtype) for absorb in (False, True))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), absorbed.parameters(), strict=True))
    for found, expected in zip(curvature(absorbed, x, y), curvature(plain, x, y), strict=True):
        assert expected.norm() > 1e-3
        assert (found - expected).norm() <= tolerance * expected.norm()


@FORMS
def test_tasks_as_a_dimension(absorb):
    model = classifier(absorb)
    parameters = stacked_parameters()
    x, _ = sequences(TASKS, BATCH)
    logits = vmap(lambda p, x: functional_call(model, p, (x,)))(parameters, x)
    for task in range(TASKS):
        own = {name: p[task] for name, p in parameters.items()}
        torch.testing.assert_close(logits[task], functional_call(model, own, (x[task],)))


@FORMS
def test_curvature_over_tasks_by_double_backward_and_by_forward_over_reverse(absorb):
    model = classifier(absorb)
    x, y = sequences(TASKS, BATCH)
    parameters = {name: p.requires_grad_() for name, p in stacked_parameters().items()}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}

    def task_loss(p, x, y):
        return F.cross_entropy(functional_call(model, p, (x,)), y)

    total = vmap(task_loss)(parameters, x, y).sum()
    names = list(parameters)
    gradients = torch.autograd.grad(total, list(parameters.values()), create_graph=True)
    along = sum((g * directions[name]).sum() for name, g in zip(names, gradients, strict=True))
    backward = torch.autograd.grad(along, list(parameters.values()))

    primals = {name: p.detach() for name, p in parameters.items()}
    inside = vmap(lambda p, d, x, y: jvp(lambda p: func_grad(task_loss)(p, x, y), (p,), (d,)))
    outside = jvp(lambda p: vmap(func_grad(task_loss))(p, x, y), (primals,), (directions,))
    for task_gradients, products in (inside(primals, directions, x, y), outside):
        for name, gradient, product in zip(names, gradients, backward, strict=True):
            torch.testing.assert_close(task_gradients[name], gradient.detach())
            torch.testing.assert_close(products[name], product)


@pytest.mark.parametrize("absorb", [False, True])
def test_second_derivatives_against_finite_differences(absorb):
    torch.manual_seed(0)
    model = SeqClassifier(2, 3, absorb_projections=absorb).double()
    x, _ = sequences(2, width=2, length=3)
    names = [name for name, _ in model.named_parameters()]

    def logits(*parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    inputs = tuple(p.detach().requires_grad_() for p in model.parameters())
    assert torch.autograd.gradgradcheck(logits, inputs, check_fwd_over_rev=True, fast_mode=True)


@FORMS
def test_the_backend_sees_one_head_and_one_query(absorb):
    calls = []

    def record(query, key, value, **call):
        calls.append((query, key, value, call))
        return scaled_dot_product_attention(query, key, value, **call, backend="reference")

    with registered_backend("recorder", record):
        model = classifier(absorb, backend="recorder")
        x, _ = sequences(BATCH)
        logits = model(x)
    ((query, key, value, call),) = calls
    assert query.shape == (BATCH, 1, 1, WIDTH)
    assert key.shape == value.shape == (BATCH, 1, LENGTH, WIDTH)
    assert call["scale"] == WIDTH**-0.5
    assert not call["is_causal"]
    torch.testing.assert_close(key[:, 0], x if absorb else x @ model.k_proj.weight.T)
    torch.testing.assert_close(value[:, 0], x if absorb else x @ model.v_proj.weight.T)
    torch.testing.assert_close(logits, classifier(absorb, backend="reference")(x))


@FORMS
def test_autocast_lowers_both_forms(absorb):
    model = classifier(absorb, dtype=torch.float32)
    x, _ = sequences(BATCH, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(4, 6, 7), (6, 8), (2, 4, 6, 8), (4, 0, 8)])
def test_wrong_inputs_are_named(shape):
    expected = f"SeqClassifier expects x of shape (batch, length >= 1, width=8), received {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        classifier()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", ["width", "num_classes"])
@pytest.mark.parametrize("size", [0, -2, True])
def test_sizes_are_positive_integers(name, size):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, received {size}"):
        SeqClassifier(**{"width": 4, "num_classes": 3, name: size})


def test_unknown_backend_is_refused_at_construction():
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        SeqClassifier(4, 3, backend="flash")


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("backend", ["reference", "custom"])
def test_the_stacked_forward_is_the_vmapped_one_through_second_order(absorb, backend):
    torch.manual_seed(0)
    model = SeqClassifier(4, 3, backend=backend, absorb_projections=absorb).double()
    names = [name for name, _ in model.named_parameters()]
    parameters = [torch.randn(2, *p.shape, dtype=torch.float64) for p in model.parameters()]
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)

    def vmapped(*stacked):
        return torch.func.vmap(
            lambda own, inputs: torch.func.functional_call(
                model, dict(zip(names, own, strict=True)), (inputs,)
            )
        )(list(stacked), x)

    def directly(*stacked):
        return model.forward_stacked(dict(zip(names, stacked, strict=True)), x)

    def orders(function):
        leaves = [p.clone().requires_grad_() for p in parameters]
        out = function(*leaves)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
        return [out.detach(), *(t.detach() for t in first), *second]

    for a, b in zip(orders(directly), orders(vmapped), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
