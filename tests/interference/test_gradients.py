"""Gradients by hooks against one backward a sample, torch.func, and whatever a loop would store."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import (
    HUGGING_FACE,
    OURS,
    autograd_gradients,
    build,
    class_loss,
    loss_of,
    samples,
    token_loss,
)
from torch.func import functional_call, grad, vmap

from theria.interference import collect, compute
from theria.interference.hooks import LinearMap, factors_by_sample
from theria.interference.store import (
    Factors,
    GradientStore,
    Whole,
    gradient_bias,
    gradient_rows,
    squared_norm,
)

ALL = (*HUGGING_FACE, *OURS)


def weight_and_bias(model, gradients, sample, module):
    """What is kept of one sample, as gradients of the module's shapes."""
    linear = LinearMap.of(model.get_submodule(module))
    outputs, inputs = linear.outputs_by_inputs(linear.weight).shape
    kept = gradients.store[sample][module]
    weight = torch.empty(outputs, inputs, dtype=gradients.dtype)
    gradient_rows(kept, "output", torch.arange(outputs), weight)
    turned = torch.empty(inputs, outputs, dtype=gradients.dtype)
    gradient_rows(kept, "input", torch.arange(inputs), turned)
    torch.testing.assert_close(turned, weight.mT)
    bias = None
    if linear.bias is not None:
        bias = torch.empty(outputs, 1, dtype=gradients.dtype)
        gradient_bias(kept, torch.arange(outputs), bias)
        bias = bias[:, 0]
    return linear.outputs_by_inputs(weight), bias


def assert_kept(model, gradients, expected, rtol=1e-10, scale=None):
    modules = {p.module for layer in gradients.layout for p in layer.projections.values()}
    for sample, by_name in enumerate(expected):
        for module in modules:
            weight, bias = weight_and_bias(model, gradients, sample, module)
            wanted = by_name[f"{module}.weight"].to(weight)
            atol = rtol * float(wanted.norm() if scale is None else scale)
            torch.testing.assert_close(weight, wanted, rtol=rtol, atol=atol)
            if bias is not None:
                torch.testing.assert_close(bias, by_name[f"{module}.bias"].to(bias), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ALL)
def test_equal_one_backward_a_sample(name):
    model = build(name)
    drawn = samples(name, 4)
    gradients = collect(model, loss_of(name), drawn)
    assert_kept(model, gradients, autograd_gradients(model, loss_of(name), drawn))
    seen_by_hooks = {"q_proj", "v_proj"} if name == "seq_classifier_absorbed" else None
    assert gradients.by_autograd == (frozenset({"k_proj"}) if seen_by_hooks else frozenset())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_equal_one_backward_under_each_attention_with_checkpointing(name, attention):
    model = build(name, attn_implementation=attention)
    drawn = samples(name, 2)
    expected = autograd_gradients(model, token_loss, drawn)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # transformers checkpoint in training mode alone; these models have no dropout
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = collect(model, token_loss, drawn)
    assert model.is_activation_checkpointing
    assert not gradients.by_autograd
    assert_kept(model, gradients, expected)


def test_reentrant_checkpointing_is_refused():
    model = build("llama")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    with pytest.raises(ValueError, match=r"self_attn.q_proj' was run by reentrant .* use_reentrant=False"):
        collect(model, token_loss, samples("llama", 1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "memory_lm", "seq_classifier"])
def test_equal_torch_func(name):
    options = {"attn_implementation": "eager"} if name in HUGGING_FACE else {}
    if name == "memory_lm":
        options = {"memory_heads": 0}
    model = build(name, **options)
    drawn = samples(name, 3, least=6, most=6)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    if name == "seq_classifier":
        stacked = tuple(torch.stack(parts) for parts in zip(*drawn, strict=True))

        def loss(values, x, label):
            return F.cross_entropy(functional_call(model, values, (x[None],)), label[None])
    else:
        stacked = (torch.stack(drawn),)

        def loss(values, tokens):
            logits = functional_call(model, values, (tokens[None],)).logits
            return F.cross_entropy(logits[0, :-1], tokens[1:])

    if name in HUGGING_FACE or name == "memory_lm":
        each = [grad(loss)(parameters, *(part[i] for part in stacked)) for i in range(3)]
    else:
        found = vmap(grad(loss), in_dims=(None, *(0 for _ in stacked)))(parameters, *stacked)
        each = [{n: g[i] for n, g in found.items()} for i in range(3)]
    assert_kept(model, collect(model, loss_of(name), drawn), each)


def padded_losses(model, batch):
    """One loss a sequence, the shorter ones padded at the end and masked."""
    length = max(len(tokens) for tokens in batch)
    padded = torch.stack([F.pad(tokens, (0, length - len(tokens)), value=2) for tokens in batch])
    options = {}
    if hasattr(model, "config"):
        mask = torch.stack([torch.arange(length) < len(tokens) for tokens in batch])
        options["attention_mask"] = mask.long()
    logits = model(padded, **options).logits
    return torch.stack([F.cross_entropy(logits[i, : len(t) - 1], t[1:]) for i, t in enumerate(batch)])


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "memory_lm"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_mixed_lengths_in_padded_batches_change_nothing(name, batch_size):
    model = build(name)
    drawn = samples(name, 7)
    alone = collect(model, token_loss, drawn)
    batched = collect(model, padded_losses, drawn, batch_size=batch_size)
    assert batched.tokens == alone.tokens
    # the last token of a sequence predicts nothing
    assert alone.tokens == tuple(len(tokens) - 1 for tokens in drawn)
    assert_kept(model, batched, autograd_gradients(model, token_loss, drawn))


def test_half_precision_is_accumulated_in_float32():
    model = build("llama")
    drawn = samples("llama", 3)
    exact = autograd_gradients(model, token_loss, drawn)
    half = model.to(torch.bfloat16)
    gradients = collect(half, token_loss, drawn)
    assert gradients.dtype == torch.float32
    assert not gradients.by_autograd
    record = gradients.store[0]["model.layers.0.self_attn.q_proj"]
    assert isinstance(record, Whole) or record.inputs.dtype == torch.bfloat16
    for sample, by_name in enumerate(exact):
        for module in ("model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj"):
            weight, _ = weight_and_bias(half, gradients, sample, module)
            assert weight.dtype == torch.float32
            wanted = by_name[f"{module}.weight"].float()
            assert (weight - wanted).norm() < 0.1 * wanted.norm()
    # products of the half-precision factors, summed in float32, whether the factors are kept or the gradient
    torch.manual_seed(0)
    factors = Factors(torch.randn(12, 6).bfloat16(), torch.randn(12, 5).bfloat16())
    wanted = factors.outputs.double().T @ factors.inputs.double()
    for out, side, expected in (
        (torch.empty(5, 6), "output", wanted),
        (torch.empty(6, 5), "input", wanted.mT),
    ):
        gradient_rows(factors, side, torch.arange(len(out)), out)
        assert (out - expected).norm() < 1e-6 * wanted.norm()
    bias = torch.empty(5, 1)
    gradient_bias(factors, torch.arange(5), bias)
    assert (bias[:, 0] - factors.outputs.double().sum(dim=0)).norm() < 1e-6 * bias.norm()
    norm = squared_norm(factors, "output", torch.arange(5), bias)
    assert norm == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    (long,) = collect(half, token_loss, samples("llama", 1, least=30, most=30)).store
    kept = long["model.layers.0.self_attn.q_proj"]
    assert isinstance(kept, Whole)
    assert kept.weight.dtype == torch.float32
    assert not torch.equal(kept.weight, kept.weight.bfloat16().float())


class Shared(torch.nn.Module):
    """Attention whose query weight is also used outside its module, and whose key weight is the value's."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            torch.nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(4)
        )
        self.v_proj.weight = self.k_proj.weight

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.softmax(q @ k.mT, dim=-1) @ v) @ self.q_proj.weight.T


def shared_loss(model, x):
    return model(x).square().mean()


def test_what_hooks_do_not_see_whole_is_taken_from_autograd():
    torch.manual_seed(0)
    model = Shared()
    drawn = [torch.randn(1, n, 4, dtype=torch.float64) for n in (3, 5)]
    gradients = collect(model, shared_loss, drawn)
    assert gradients.by_autograd == {"q_proj", "k_proj", "v_proj"}
    for sample, x in enumerate(drawn):
        expected = torch.autograd.grad(shared_loss(model, x), list(model.parameters()))
        for module, wanted in zip(("q_proj", "k_proj", "o_proj"), expected, strict=True):
            torch.testing.assert_close(weight_and_bias(model, gradients, sample, module)[0], wanted)
    with pytest.raises(ValueError, match=r"gradient of 'k_proj' is not the sum .* leave batch_size out"):
        collect(model, lambda m, b: torch.stack([shared_loss(m, torch.cat(b))]), drawn[:1], batch_size=1)


def test_a_map_that_first_has_no_gradient_is_checked_when_it_has():
    torch.manual_seed(0)
    model = Shared()
    x = torch.randn(1, 3, 4, dtype=torch.float64)

    def loss(model, sample):
        number, x = sample
        return model.o_proj(x).square().mean() if number == 0 else shared_loss(model, x)

    gradients = collect(model, loss, [(0, x), (1, x)])
    assert set(gradients.store[0]) == {"o_proj"}
    wanted = torch.autograd.grad(shared_loss(model, x), model.q_proj.weight)[0]
    torch.testing.assert_close(weight_and_bias(model, gradients, 1, "q_proj")[0], wanted)


def test_outputs_changed_in_place_and_maps_called_twice():
    torch.manual_seed(0)

    class Twice(Shared):
        def forward(self, x):
            q = self.q_proj(x).mul_(3.0)
            k, v = self.k_proj(x), self.v_proj(input=x)
            read = torch.softmax(q @ k.mT, dim=-1) @ v
            return self.o_proj(torch.tanh(self.o_proj(read)))

    model = Twice()
    model.v_proj.weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gradients = collect(model, shared_loss, [x])
    assert not gradients.by_autograd
    assert_kept(model, gradients, autograd_gradients(model, shared_loss, [x]))


def test_the_model_is_left_as_it_was():
    model = build("llama")
    parameters = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    with torch.no_grad():
        collect(model, token_loss, samples("llama", 2))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    assert all((p.grad == 7.0).all() for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())

    def broken(model, tokens):
        raise RuntimeError("a loss of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        collect(model, broken, samples("llama", 1))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("loss", "batch_size", "message"),
    [
        (lambda m, t: m(t[None]).logits[0, :, 0], None, r"scalar for one sample, .*received \(\d"),
        (lambda m, t: token_loss(m, t).item(), None, "received float"),
        (lambda m, t: token_loss(m, t).detach(), None, "depends on no parameter"),
        (lambda m, b: token_loss(m, b[0]), 2, r"one loss for each of 2 samples, .*\(2,\), received \(\)"),
        (
            lambda m, b: torch.stack([token_loss(m, t) for t in b]),
            2,
            r"in a batch of 2 samples the first dimension .* received \(1, ",
        ),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(loss, batch_size, message):
    with pytest.raises(ValueError, match=message):
        collect(build("llama"), loss, samples("llama", 2), batch_size=batch_size)


def test_a_long_sample_is_kept_as_the_gradient_itself():
    model = build("seq_classifier")
    drawn = samples("seq_classifier", 1, least=2, most=2) + samples("seq_classifier", 1, least=9)
    gradients = collect(model, class_loss, drawn)
    assert isinstance(gradients.store[0]["v_proj"], Factors)
    assert isinstance(gradients.store[1]["v_proj"], Whole)
    assert_kept(model, gradients, autograd_gradients(model, class_loss, drawn))


def test_an_autocast_around_it_all_stays_out_of_its_arithmetic():
    """The loss chooses the model's precision; products of factors, squares and scores stay in float32."""
    model = build("llama").float()
    drawn = samples("llama", 3) + samples("llama", 3, seed=1, least=20, most=24)

    def loss(model, tokens):
        with torch.autocast("cpu", enabled=False):
            return token_loss(model, tokens)

    with pytest.warns(UserWarning, match="fewer than"):
        expected = compute(model, loss, drawn[:3], drawn[3:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = collect(model, loss, drawn)
        with pytest.warns(UserWarning, match="fewer than"):
            found = compute(model, loss, drawn[:3], drawn[3:])
    assert any(isinstance(g, Whole) for g in gradients.store[5].values())
    assert_kept(model, gradients, autograd_gradients(model, loss, drawn), rtol=1e-5)
    for variant in expected.variants:
        for block in expected.blocks:
            np.testing.assert_array_equal(found.scores[variant][block], expected.scores[variant][block])


def test_separate_projections_share_one_copy_of_their_input():
    gradients = collect(build("llama"), token_loss, samples("llama", 1, most=4))
    record = gradients.store[0]
    base = "model.layers.0.self_attn"
    assert record[f"{base}.q_proj"].inputs is record[f"{base}.v_proj"].inputs
    assert gradients.store.held_bytes == sum(
        t.numel() * 8 for t in {id(t): t for g in record.values() for t in g if t is not None}.values()
    )


def test_tokens_are_dropped_where_no_map_of_their_input_has_a_gradient():
    x, other = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    first, second, third = (torch.randn(1, 4, 2) for _ in range(3))
    first[:, [0, 3]], second[:, [1, 3]], third[:, 1:] = 0, 0, 0
    calls = [("q", x, first), ("k", x, second), ("o", other, third)]
    (found,) = factors_by_sample(calls, 1, torch.device("cpu"))
    for name, inputs, outputs, rows in (
        ("q", x, first, [0, 1, 2]),
        ("k", x, second, [0, 1, 2]),
        ("o", other, third, [0]),
    ):
        assert torch.equal(found[name].inputs, inputs[0, rows])
        assert torch.equal(found[name].outputs, outputs[0, rows])


def mapped(directory):
    """How many files below a directory this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split(maxsplit=5)[5] for line in lines if str(directory) in line})


def test_records_beyond_the_memory_are_mapped_files(tmp_path):
    torch.manual_seed(0)

    def record(number):
        x = torch.full((5, 4), float(number))
        return {
            "q": Factors(x, torch.randn(5, 3).bfloat16()),
            "k": Factors(x, torch.randn(5, 2)),
            "v": Whole(torch.randn(3, 4).mT, None),
            "w": Whole(torch.randn(3, 4), torch.randn(3)),
        }

    size = 4 * (20 + 10 + 12 + 12 + 3) + 2 * 15
    records = [record(n) for n in range(3)] + [{}]
    store = GradientStore(size, tmp_path)
    for one in records:
        store.append(one)
    assert (len(store), store.held_bytes, store.spilled_bytes) == (4, size, 2 * size)
    # mapped, and without a name that a killed process would leave
    assert mapped(tmp_path) == 2
    assert not list(tmp_path.iterdir())
    for number, one in enumerate(records):
        for name, gradient in one.items():
            for found, wanted in zip(store[number][name], gradient, strict=True):
                assert (found is None and wanted is None) or torch.equal(found, wanted)
    assert store[1]["q"].inputs is store[1]["k"].inputs
    del store, found
    gc.collect()
    assert not mapped(tmp_path)


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("side", ["output", "input"])
def test_squared_norms_of_rows(tokens, side):
    torch.manual_seed(0)
    factors = Factors(torch.randn(tokens, 6).double(), torch.randn(tokens, 6).double())
    whole = Whole(factors.outputs.T @ factors.inputs, None)
    like = torch.zeros((), dtype=torch.float64)
    for features in ([0, 1, 2, 3], [4, 1]):
        rows = whole.weight if side == "output" else whole.weight.mT
        expected = rows[features].square().sum()
        for gradient in (factors, whole):
            found = squared_norm(gradient, side, torch.tensor(features), like)
            torch.testing.assert_close(found, expected)
