"""The Triton operators against the formulas in float64: on a CUDA device, else under Triton's interpreter.

Every output buffer is filled with NaN before a launch, so what no program writes is seen.
"""

import copy
import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.func import grad, jvp, vmap

from theria.attention import custom, scaled_dot_product_attention, triton_fused
from theria.attention.autograd import differentiable_attention
from theria.attention.call import AttentionCall
from theria.attention.custom import CustomOperators
from theria.attention.kernels import assembler, compilation, support, tiles
from theria.attention.kernels.common import thirds
from theria.attention.operators import AttentionOperators, Band, Gradients
from theria.attention.registry import select_backend
from theria.attention.triton_fused import TritonOperators, launches
from theria.maml import meta_gradient
from theria.models.seq_classifier import SeqClassifier

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPERATORS, FORMULAS = TritonOperators(), CustomOperators()

# autograd's thread makes torch say, once a process, that it sets up CUDA for itself
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_empty", "_empty_rows"):
        allocate = getattr(triton_fused, name)
        monkeypatch.setattr(
            triton_fused, name, lambda *args, allocate=allocate: allocate(*args).fill_(torch.nan)
        )


@dataclass
class Operands:
    """Everything that the five operators take, but what the forward yields."""

    query: Tensor
    key: Tensor
    value: Tensor
    cotangent: Tensor
    directions: Gradients
    others: Gradients

    @classmethod
    def draw(cls, sizes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> "Operands":
        batch, heads, kv_heads, queries, keys, dim, value_dim = sizes
        generator = torch.Generator(DEVICE).manual_seed(seed)
        of_queries, of_keys = (batch, heads, queries), (batch, kv_heads, keys)
        shapes = [(*of_queries, dim), (*of_keys, dim), (*of_keys, value_dim)]

        def one_each(*shapes: tuple[int, ...]) -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes]

        inputs, tangents = one_each(*shapes), Gradients(*one_each(*shapes))
        return cls(*inputs, *one_each((*of_queries, value_dim)), tangents, Gradients(*one_each(*shapes)))

    def map(self, function) -> "Operands":
        tensors = (self.query, self.key, self.value, self.cotangent)
        tangents = (Gradients(*map(function, group)) for group in (self.directions, self.others))
        return Operands(*map(function, tensors), *tangents)

    def outputs(self, operators: AttentionOperators, band: Band) -> dict[str, Tensor]:
        """All that the operators compute, by name."""
        inputs = self.query, self.key, self.value
        out, lse = operators.forward(*inputs, band)
        primals = *inputs, out, lse
        first = operators.vjp(*primals, self.cotangent, band)
        second = operators.hvp(*primals, self.cotangent, self.directions, band)
        moved = operators.jvp(*primals, self.directions, band)
        twice = operators.second_jvp(*primals, self.directions, self.others, band)
        names = ["out", "lse", "dq", "dk", "dv", "jvp", "gq", "gk", "gv", "gdo", "second jvp"]
        return dict(zip(names, (out, lse, *first, moved, *second, twice), strict=True))


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm; infinities have to stand in the same places.

    Of what is zero but for the rounding of float64, the root mean square of the error.
    """
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(found), finite)
    assert torch.equal(found[~finite].double(), expected[~finite])
    error = (found.double() - expected)[finite].norm()
    norm, size = expected[finite].norm(), finite.sum().sqrt()
    return (error / (norm if norm > 1e-12 * size else size)).item() if size > 0 else 0.0


# (batch, heads, key-value heads, queries, keys, dim, value dim) and the band
COVERING = {
    "one row, one key": ((2, 1, 1, 1, 1, 8, 8), Band(0.4)),
    "one row": ((2, 2, 1, 1, 63, 64, 24), Band(0.1)),
    "one key": ((1, 2, 2, 31, 1, 16, 16), Band(0.3, causal=True)),
    "two rows, wide": ((1, 2, 2, 2, 31, 40, 64), Band(0.2, causal=True, offset=29)),
    "shared head": ((1, 4, 1, 31, 63, 8, 24), Band(0.4)),
    "causal": ((1, 2, 2, 63, 63, 24, 16), Band(0.2, causal=True)),
    "causal, long": ((1, 1, 1, 97, 97, 16, 40), Band(0.3, causal=True)),
    "causal, shared heads": ((1, 4, 2, 63, 31, 16, 8), Band(0.3, causal=True)),
    "suffix of queries": ((1, 2, 1, 31, 97, 64, 64), Band(0.1, causal=True, offset=66)),
    "rows without a key": ((2, 1, 1, 63, 31, 24, 24), Band(0.2, causal=True, offset=-32)),
    "no row has a key": ((1, 1, 1, 31, 31, 8, 8), Band(0.2, causal=True, offset=-40)),
    "window": ((1, 2, 1, 97, 97, 8, 16), Band(0.3, causal=True, window=20)),
    "window of one": ((1, 1, 1, 63, 63, 16, 8), Band(0.3, causal=True, window=1)),
    "window, suffix": ((1, 1, 1, 31, 97, 40, 24), Band(0.3, causal=True, offset=66, window=33)),
    "window beyond everything": ((1, 1, 1, 31, 63, 16, 16), Band(0.3, causal=True, window=2**40)),
    "window of whole tiles": ((1, 1, 1, 96, 128, 16, 16), Band(0.3, causal=True, offset=30, window=93)),
    "window longer than the keys, left behind by some rows": (
        (1, 1, 1, 97, 31, 16, 16),
        Band(0.3, causal=True, window=40),
    ),
    "no keys": ((1, 2, 1, 5, 0, 8, 8), Band(0.3)),
    "no rows": ((1, 2, 1, 0, 5, 8, 8), Band(0.3)),
    "no batch": ((0, 2, 1, 3, 5, 8, 8), Band(0.3)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3)])
@pytest.mark.parametrize("case", list(COVERING))
def test_every_output_equals_the_formulas(case, dtype, tolerance):
    sizes, band = COVERING[case]
    operands = Operands.draw(sizes, dtype)
    found = operands.outputs(OPERATORS, band)
    expected = operands.map(Tensor.double).outputs(FORMULAS, band)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name in ("out", "lse") else dtype)
        if name == "lse" and sizes[4] == 0:
            assert (value == torch.inf).all()  # the formulas' sum over nothing is -inf
            continue
        assert relative(value, expected[name]) <= tolerance, name


def test_any_strides_are_read():
    band = Band(0.3, causal=True)
    operands = Operands.draw((2, 2, 2, 31, 31, 16, 16), torch.float32)
    expected = operands.outputs(OPERATORS, band)
    layouts = itertools.cycle([(3, 1, 0, 2), (2, 0, 3, 1), (1, 3, 2, 0)])

    def rearranged(tensor: Tensor) -> Tensor:
        layout = next(layouts)
        back = [layout.index(dim) for dim in range(4)]
        return tensor.permute(layout).contiguous().permute(back)

    for name, value in operands.map(rearranged).outputs(OPERATORS, band).items():
        assert relative(value, expected[name].double()) <= 1e-6, name  # sums in another order


def test_negated_views_are_read():
    """Conjugated complex tensors leave real ones whose sign is a flag that raw pointers do not show."""
    operands = Operands.draw((1, 2, 1, 17, 19, 16, 8), torch.float32)
    negated = operands.map(lambda t: torch.complex(t, -t).conj().imag)
    assert negated.query.is_neg()
    expected = operands.outputs(OPERATORS, Band(0.3, causal=True))
    for name, value in negated.outputs(OPERATORS, Band(0.3, causal=True)).items():
        assert torch.equal(value, expected[name]), name


def test_expanded_operands_are_read():
    operands = Operands.draw((2, 2, 2, 17, 17, 16, 16), torch.float32)
    expanded = operands.map(lambda t: t[:1, :1, :1].expand_as(t))
    found = expanded.outputs(OPERATORS, Band(0.3))
    for name, value in expanded.map(Tensor.double).outputs(FORMULAS, Band(0.3)).items():
        # keys that are all equal leave no gradient but rounding
        assert (found[name].double() - value).norm() <= 1e-4 * (1 + value.norm()), name


def test_curvature_is_symmetric():
    """<H x, y> = <x, H y> for two directions of the Hessian of <dO, O>."""
    band = Band(0.3, causal=True)
    sizes = (1, 2, 1, 40, 40, 24, 16)
    operands, other = Operands.draw(sizes, torch.float32), Operands.draw(sizes, torch.float32, seed=1)
    inputs = operands.query, operands.key, operands.value
    primals = *inputs, *OPERATORS.forward(*inputs, band), operands.cotangent

    def quadratic(along: Gradients, against: Gradients) -> Tensor:
        product = OPERATORS.hvp(*primals, along, band)[:3]
        return sum((a * b).double().sum() for a, b in zip(product, against, strict=True))

    forth = quadratic(operands.directions, other.directions)
    back = quadratic(other.directions, operands.directions)
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=0)


def test_the_cotangents_part_of_the_curvature_is_the_jvp():
    operands = Operands.draw((1, 2, 1, 40, 33, 24, 16), torch.float32)
    outputs = operands.outputs(OPERATORS, Band(0.3, causal=True))
    assert torch.equal(outputs["gdo"], outputs["jvp"])


def test_two_calls_give_equal_bits():
    band = Band(0.3, causal=True)
    operands = Operands.draw((1, 4, 2, 70, 70, 16, 16), torch.float16)
    first, second = operands.outputs(OPERATORS, band), operands.outputs(OPERATORS, band)
    assert all(torch.equal(first[name], second[name]) for name in first)


def total(values) -> Tensor:
    return sum(value.sin().sum() for value in values)


def attention_of(operators: AttentionOperators, band: Band):
    return lambda *inputs: differentiable_attention(*inputs, operators, band)[0]


def reverse(attention, inputs, directions, order):
    leaves = [x.clone().requires_grad_() for x in inputs]
    value, found = attention(*leaves).sin().sum(), []
    for _ in range(order):
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        found += gradients
        value = sum((g.sin() * t).sum() for g, t in zip(gradients, directions, strict=True))
    return found


def gradients_of(attention):
    return grad(lambda *inputs: attention(*inputs).sin().sum(), argnums=(0, 1, 2))


def vmapped_grad_of_grad(attention, inputs, _):
    second = grad(lambda *x: total(gradients_of(attention)(*x)), argnums=(0, 1, 2))
    stacked = [torch.stack([x, 0.5 * x]) for x in inputs]
    return vmap(second, in_dims=(0, None, 0))(stacked[0], inputs[1], stacked[2])


def forward_twice(attention, inputs, tangents, *, wanted=(0, 1, 2), moving=False):
    """Along the tangents and then along others, of the wanted inputs alone; the tangents may move too."""

    def only(tensors) -> tuple[Tensor, ...]:
        return tuple(tensors[i] for i in wanted)

    def of_some(*some: Tensor) -> Tensor:
        given = dict(zip(wanted, some, strict=True))
        return attention(*(given.get(i, x) for i, x in enumerate(inputs)))

    def once(*some: Tensor) -> Tensor:
        return jvp(of_some, some, tuple(x.sin() for x in some) if moving else only(tangents))[1]

    return (jvp(once, only(inputs), only([t.cos() for t in tangents]))[1],)


COMPOSITIONS = {
    "backward": lambda f, x, t: reverse(f, x, t, 1),
    "double backward": lambda f, x, t: reverse(f, x, t, 2),
    # of leaves, which no call of the public function hands on, the engine would not say who awaits them
    "functional.hvp": lambda f, x, t: torch.autograd.functional.hvp(
        lambda *y: f(*(z.clone() for z in y)).sin().sum(), x, t
    )[1],
    "jvp(grad)": lambda f, x, t: jvp(gradients_of(f), x, t)[1],
    "grad(jvp)": lambda f, x, t: grad(lambda *y: jvp(f, y, t)[1].sin().sum(), argnums=(0, 1, 2))(*x),
    "vmap(grad(grad))": vmapped_grad_of_grad,
    "jvp(jvp)": forward_twice,
    "jvp(jvp) by the query alone": lambda f, x, t: forward_twice(f, x, t, wanted=(0,)),
    "jvp(jvp) along tangents that move": lambda f, x, t: forward_twice(f, x, t, moving=True),
    "vmap(jvp(jvp))": lambda f, x, t: vmap(lambda *y: forward_twice(f, y, t)[0], in_dims=(0, None, 0))(
        *(torch.stack([z, 0.5 * z]) if i != 1 else z for i, z in enumerate(x))
    ),
}
THIRD = {
    "third order": lambda f, x, t: reverse(f, x, t, 3),
    "grad(jvp(grad))": lambda f, x, t: grad(
        lambda *y: total(jvp(gradients_of(f), y, t)[1]), argnums=(0, 1, 2)
    )(*x),
    "grad(jvp(jvp))": lambda f, x, t: grad(lambda *y: total(forward_twice(f, y, t)), argnums=(0, 1, 2))(*x),
}


@pytest.mark.parametrize("composition", [*COMPOSITIONS, *THIRD])
def test_the_chain_over_the_kernels_is_exact(composition):
    band = Band(0.3, causal=True)
    operands = Operands.draw((1, 2, 1, 9, 17, 8, 16), torch.float32)
    compute = (COMPOSITIONS | THIRD)[composition]
    exact = operands.map(Tensor.double)
    expected = compute(
        attention_of(FORMULAS, band), (exact.query, exact.key, exact.value), tuple(exact.directions)
    )
    found = compute(
        attention_of(OPERATORS, band),
        (operands.query, operands.key, operands.value),
        tuple(operands.directions),
    )
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= 5e-6


@pytest.fixture
def forbidden_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor-operation formulas of attention raise."""

    def refuse(*_):
        raise AssertionError("the formulas were used in place of a kernel")

    for name in ("forward", "vjp"):
        monkeypatch.setattr(CustomOperators, name, refuse)
    for name in ("jvp_formula", "hvp_formula", "second_jvp_formula"):
        monkeypatch.setattr(custom, name, refuse)


@pytest.mark.usefixtures("forbidden_formulas")
@pytest.mark.parametrize("composition", list(COMPOSITIONS))
def test_orders_up_to_the_second_are_launches(composition):
    operands = Operands.draw((1, 2, 1, 9, 17, 8, 16), torch.float32)
    launches.clear()
    COMPOSITIONS[composition](
        attention_of(OPERATORS, Band(0.3)),
        (operands.query, operands.key, operands.value),
        tuple(operands.directions),
    )
    if "jvp(jvp)" in composition:
        # the tangents' own movement is one launch of the jvp more, and what has no tangent costs none
        times = 3 if "move" in composition else 2
        assert launches == {"forward_rows": 1, "jvp_rows": times, "second_jvp_rows": 1}
        return
    first_order = {"forward_rows", "vjp_rows", "vjp_columns"}
    assert first_order <= launches.keys()
    if composition != "backward":
        assert {"jvp_rows", "hvp_rows", "hvp_columns"} <= launches.keys()


def test_a_second_derivative_by_the_tangent_alone_is_one_jvp():
    operands = Operands.draw((1, 2, 1, 9, 17, 8, 16), torch.float32)
    attention = attention_of(OPERATORS, Band(0.3))
    launches.clear()

    def along(a: Tensor) -> Tensor:
        return jvp(lambda q: attention(q, operands.key, operands.value), (operands.query,), (a,))[1]

    found, derivative = jvp(along, (operands.directions.query,), (operands.others.query,))
    assert launches == {"forward_rows": 1, "jvp_rows": 2}
    assert torch.equal(derivative, along(operands.others.query))
    assert not torch.equal(derivative, found)


def test_training_compiles_no_kernel_of_nested_forward_mode():
    operands = Operands.draw((1, 2, 1, 9, 17, 8, 16), torch.float32)
    inputs = operands.query, operands.key, operands.value
    beforehand = triton_fused._derivatives(*inputs, *OPERATORS.forward(*inputs, Band(0.3)))
    names = {name for operands_of in beforehand for name in operands_of()}
    assert names == {"vjp_rows", "vjp_columns", "jvp_rows", "hvp_rows", "hvp_columns"}


def test_an_operator_is_its_kernels_and_no_more():
    operands = Operands.draw((2, 2, 1, 9, 17, 8, 16), torch.float32)
    launches.clear()
    operands.outputs(OPERATORS, Band(0.3))
    assert launches == {
        "forward_rows": 1,
        "vjp_rows": 1,
        "vjp_columns": 1,
        "jvp_rows": 2,
        "hvp_rows": 1,
        "hvp_columns": 1,
        "second_jvp_rows": 1,
    }


@pytest.mark.usefixtures("forbidden_formulas")
@pytest.mark.parametrize("composition", list(THIRD))
def test_the_third_order_takes_the_formulas(composition):
    operands = Operands.draw((1, 1, 1, 9, 9, 8, 8), torch.float32)
    inputs, directions = (operands.query, operands.key, operands.value), tuple(operands.directions)
    with pytest.raises(AssertionError, match="the formulas were used"):
        THIRD[composition](attention_of(OPERATORS, Band(0.3)), inputs, directions)


def meta_gradient_error(steps: int, tasks: int, batch: int, length: int) -> float:
    """Relative distance of the FULL meta-gradient on the kernels from the explicit softmax in float64."""
    torch.manual_seed(0)
    model = SeqClassifier(64, 5, backend="reference").to(DEVICE)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, batch, length, 64)
        return x.to(DEVICE), torch.randint(5, (tasks, batch)).to(DEVICE)

    support, query = draw(), draw()
    options = {"mode": "FULL", "inner_steps": steps, "inner_lr": 0.4}
    exact = meta_gradient(
        copy.deepcopy(model).double(),
        (support[0].double(), support[1]),
        (query[0].double(), query[1]),
        **options,
    ).grads
    model.backend = "triton_fused"
    found = meta_gradient(model, support, query, **options).grads
    error = sum((found[n].double() - exact[n]).square().sum() for n in exact)
    return (error / sum(g.square().sum() for g in exact.values())).sqrt().item()


@pytest.mark.usefixtures("forbidden_formulas")
@pytest.mark.parametrize("steps", [1, 5])
def test_full_meta_gradient(steps):
    assert meta_gradient_error(steps, tasks=2, batch=2, length=17) <= 2e-6


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the device is there")
def test_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(support, "INTERPRETED", False)
    operands = Operands.draw((1, 1, 1, 3, 3, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=r"CUDA devices, and the CPU where TRITON_INTERPRET=1 .*, not cpu"):
        OPERATORS.forward(operands.query, operands.key, operands.value, Band(1.0))


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (257, torch.float32, "widths up to 256, not 257"),
        (8, torch.float64, r"torch.float32, torch.bfloat16, torch.float16, not torch.float64"),
    ],
)
def test_what_no_kernel_computes_is_refused(width, dtype, message):
    operands = Operands.draw((1, 1, 1, 3, 3, 8, width), dtype)
    with pytest.raises(ValueError, match=message):
        OPERATORS.forward(operands.query, operands.key, operands.value, Band(1.0))


def test_operands_of_several_dtypes_are_refused():
    operands = Operands.draw((1, 1, 1, 3, 3, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=r"one dtype and device .*, not torch.float16"):
        OPERATORS.forward(operands.query, operands.key.half(), operands.value, Band(1.0))
    inputs = operands.query, operands.key, operands.value
    primals = *inputs, *OPERATORS.forward(*inputs, Band(1.0))
    half = operands.others._replace(value=operands.others.value.half())
    with pytest.raises(ValueError, match=r"one dtype and device .*, not torch.float16"):
        OPERATORS.second_jvp(*primals, operands.directions, half, Band(1.0))


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"one of \('ieee', 'fma', 'bf16x6', 'tf32x3', 'tf32'\)"):
        TritonOperators(precision="float32")


def call_of(device: str, width: int) -> AttentionCall:
    shape = (1, 2, 9, width)
    return AttentionCall(
        query_shape=shape,
        key_shape=shape,
        value_shape=shape,
        dtype=torch.float32,
        device=torch.device(device),
        is_causal=False,
        window=None,
        causal_alignment="upper_left",
        scale=1.0,
        enable_gqa=False,
    )


def test_the_backend_takes_what_the_kernels_compute_and_auto_gives_it_cuda_calls():
    assert select_backend(call_of("cuda", 256), "triton_fused") == "triton_fused"
    assert select_backend(call_of("cuda", 256), "auto") == "triton_fused"
    assert select_backend(call_of("cuda", 257), "auto") == "reference"
    assert select_backend(call_of("cpu", 64), "auto") == "reference"
    with pytest.raises(NotImplementedError, match="it supports widths up to 256, not 257"):
        select_backend(call_of("cuda", 257), "triton_fused")


@pytest.mark.parametrize(
    ("dtype", "width", "refused"),
    [(torch.float32, 129, True), (torch.float32, 128, False), (torch.float16, 256, False)],
)
def test_wide_float32_needs_shared_memory(monkeypatch, dtype, width, refused):
    properties = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": 101_376})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(utils=properties))
    monkeypatch.setattr(assembler, "_is_hopper", lambda device: False)
    reason = support.refusal(dtype, torch.device("cuda:0"), width)
    assert (reason is not None) == refused
    assert reason is None or "131072 bytes of shared memory, not 101376" in reason


@pytest.mark.parametrize(
    ("precision", "generation", "taken"),
    [("ieee", "hopper", "ieee"), ("ieee", "ampere", "fma"), ("tf32x3", "ampere", "tf32x3")],
)
def test_exact_products_are_taken_where_the_units_find_them_in_shared_memory(
    monkeypatch, precision, generation, taken
):
    monkeypatch.setattr(tiles, "generation", lambda device: generation)
    assert tiles.arithmetic(precision, torch.device("cuda")) == taken
    assert tiles.arithmetic(precision, torch.device("cpu")) == precision


def test_tuned_tiles_keep_the_parts_of_exact_products_out_of_registers():
    """The rows of every product are those of the tile that a program owns."""
    for (device, taken, _), kernels in tiles.TUNED.items():
        if (device, taken) == ("hopper", "ieee"):
            owned = {name: t.keys if name.endswith("_columns") else t.queries for name, t in kernels.items()}
            assert min(owned.values()) >= 64


# --- on a GPU ---------------------------------------------------------------------------------------------


def explicit_softmax(operands: Operands, band: Band) -> dict[str, Tensor]:
    """The same outputs by autograd through an explicit softmax, computed in the operands' dtype."""
    sharing = operands.query.shape[1] // operands.key.shape[1]
    own = torch.arange(operands.query.shape[2], device=DEVICE)[:, None] + band.offset
    index = torch.arange(operands.key.shape[2], device=DEVICE)[None, :]
    hidden = (index > own) if band.causal else torch.zeros_like(index > own)
    if band.window is not None:
        hidden |= index <= own - band.window
    dead = hidden.all(-1, keepdim=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = band.scale * q @ k.repeat_interleave(sharing, 1).mT
        if band.causal:
            p = scores.masked_fill(hidden & ~dead, -torch.inf).softmax(-1).masked_fill(dead, 0)
        else:
            p = scores.softmax(-1)
        return p @ v.repeat_interleave(sharing, 1)

    inputs = operands.query, operands.key, operands.value
    q, k, v = (t.clone().requires_grad_() for t in inputs)
    cotangent = operands.cotangent.clone().requires_grad_()
    out = attend(q, k, v)
    first = torch.autograd.grad(out, (q, k, v), cotangent, create_graph=True)
    second = torch.autograd.grad(first, (q, k, v, cotangent), operands.directions)
    twice = jvp(lambda *x: jvp(attend, x, tuple(operands.directions))[1], inputs, tuple(operands.others))[1]
    names = ["out", "dq", "dk", "dv", "gq", "gk", "gv", "gdo", "second jvp"]
    return {n: t.detach() for n, t in zip(names, (out, *first, *second, twice), strict=True)}


LARGE = {
    "causal": ((2, 4, 4, 1025, 1025, 64, 64), Band(0.125, causal=True)),
    "full": ((1, 2, 2, 513, 700, 64, 64), Band(0.125)),
    "full, wide": ((1, 2, 2, 512, 512, 128, 128), Band(0.09)),
    "one shared head, suffix": ((1, 4, 1, 257, 1025, 128, 64), Band(0.09, causal=True, offset=768)),
    "odd widths, window": ((1, 2, 2, 1000, 1000, 40, 72), Band(0.15, causal=True, window=100)),
    "widest": ((2, 2, 2, 97, 130, 256, 256), Band(0.06, causal=True, offset=33)),
    "causal, long": ((1, 2, 2, 4097, 4097, 64, 64), Band(0.125, causal=True)),
    "rows without a key": ((1, 4, 2, 300, 100, 64, 64), Band(0.125, causal=True, offset=-200)),
    # widths that one assembler or another has turned into wrong code
    "narrow values": ((2, 2, 2, 150, 150, 40, 16), Band(0.15, causal=True)),
    "values of 32": ((2, 2, 2, 150, 150, 64, 32), Band(0.125, causal=True, window=9)),
    "narrow keys": ((2, 2, 1, 257, 150, 16, 20), Band(0.25)),
    "keys of 32, wide values": ((1, 2, 2, 150, 150, 32, 128), Band(0.17, causal=True)),
    "wide keys, values of 32": ((1, 2, 2, 150, 150, 128, 32), Band(0.09, causal=True)),
    "beyond 128": ((1, 4, 2, 100, 33, 136, 136), Band(0.09)),
}
RMS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(RMS))
@pytest.mark.parametrize("case", list(LARGE))
def test_errors_are_those_of_the_same_dtype_explicit_softmax(case, dtype):
    sizes, band = LARGE[case]
    operands = Operands.draw(sizes, dtype)
    found = operands.outputs(OPERATORS, band)
    exact = explicit_softmax(operands.map(Tensor.double), band)
    same_dtype = explicit_softmax(operands, band)
    for name, value in exact.items():
        allowed = (2 if name == "out" else 3) * (same_dtype[name].double() - value).abs().max()
        assert (found[name].double() - value).abs().max() <= allowed, name
        assert relative(found[name], value) <= RMS[dtype], name
    assert torch.equal(found["jvp"], found["gdo"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("ieee", 1e-6), ("fma", 2e-6), ("bf16x6", 2e-6), ("tf32x3", 1e-5), ("tf32", 5e-3)],
)
def test_selectable_precisions(precision, tolerance):
    sizes, band = LARGE["causal"]
    operands = Operands.draw(sizes, torch.float32)
    found = operands.outputs(TritonOperators(precision), band)
    for name, value in explicit_softmax(operands.map(Tensor.double), band).items():
        assert relative(found[name], value) <= tolerance, name


@pytest.mark.parametrize("offset", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_derivatives_in_half_precision_do_not_feel_the_size_of_keys_and_values(dtype, offset):
    """Within three times the error of the same-dtype explicit softmax, root mean square."""
    operands = Operands.draw((1, 2, 2, 96, 96, 16, 16), torch.float32)
    operands.key += offset
    operands.value += offset
    operands, band = operands.map(lambda t: t.to(dtype)), Band(0.25)
    found = operands.outputs(OPERATORS, band)
    exact = explicit_softmax(operands.map(Tensor.double), band)
    same_dtype = explicit_softmax(operands, band)
    for name, value in exact.items():
        assert relative(found[name], value) <= 3 * relative(same_dtype[name], value), name


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 5.0), (30.0, 0.25)])
def test_derivatives_do_not_feel_the_size_of_scores(offset, scale):
    """Within three times the error of the explicit softmax in float32, root mean square over four draws."""
    errors, allowed = defaultdict(float), defaultdict(float)
    for seed in range(4):
        operands = Operands.draw((1, 2, 2, 64, 64, 16, 16), torch.float32, seed)
        operands.key += offset
        found = operands.outputs(OPERATORS, Band(scale))
        same_dtype = explicit_softmax(operands, Band(scale))
        for name, value in explicit_softmax(operands.map(Tensor.double), Band(scale)).items():
            errors[name] += relative(found[name], value) ** 2
            allowed[name] += 9 * relative(same_dtype[name], value) ** 2
    assert all(errors[name] <= allowed[name] for name in errors), (errors, allowed)


def test_derivatives_do_not_feel_the_rounding_of_lse():
    """All weights of a row too large by one factor: every operator divides by their sum."""
    band = Band(0.3, causal=True)
    operands = Operands.draw((1, 2, 1, 40, 40, 16, 16), torch.float32)

    class Shifted(TritonOperators):
        def forward(self, *args):
            out, lse = super().forward(*args)
            return out, lse - 0.01

    found, expected = operands.outputs(Shifted(), band), operands.outputs(OPERATORS, band)
    for name in found.keys() - {"lse"}:
        assert relative(found[name], expected[name].double()) <= 2e-6, name


@pytest.mark.parametrize("order", ["dq", "gq", "second jvp"])
def test_the_chain_keeps_the_unrounded_output(order):
    """The errors above, asked of the backend: a chain that saved the rounded O errs several times as much."""
    torch.manual_seed(0)
    inputs = [(torch.randn(1, 1, 96, 16) + shift).half() for shift in (0.0, 3.0, 10.0)]
    cotangent, *directions = (torch.randn(1, 1, 96, 16).half() for _ in range(4))

    def derivative(backend: str, dtype: torch.dtype) -> Tensor:
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
        attend = functools.partial(scaled_dot_product_attention, backend=backend)
        if order == "second jvp":
            moving = tuple(t.to(DEVICE, dtype) for t in directions)
            return jvp(lambda *x: jvp(attend, x, moving)[1], tuple(x.detach() for x in leaves), moving)[1]
        out = attend(*leaves)
        first = torch.autograd.grad(out, leaves, cotangent.to(DEVICE, dtype), create_graph=True)
        if order == "dq":
            return first[0].detach()
        return torch.autograd.grad(first, leaves[0], [t.to(DEVICE, dtype) for t in directions])[0]

    allowed = {"dq": 3e-3, "gq": 2.5e-2, "second jvp": 3.5e-3}
    exact = derivative("reference", torch.float64)
    assert relative(derivative("triton_fused", torch.float16), exact) <= allowed[order]


def test_tiles_outside_of_the_band_are_not_visited():
    """What stands there may be NaN: nothing of it reaches an output."""
    operands = Operands.draw((1, 1, 1, 64, 160, 16, 16), torch.float32)
    band = Band(0.3, causal=True, offset=64, window=40)  # keys 25 to 127
    for tensor in (operands.key, operands.value, *operands.directions[1:], *operands.others[1:]):
        tensor[:, :, 128:] = torch.nan
    for name, value in operands.outputs(OPERATORS, band).items():
        rows = slice(0, 128) if name in ("dk", "dv", "gk", "gv") else slice(None)
        assert torch.isfinite(value[:, :, rows]).all(), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at overflows
@pytest.mark.parametrize(
    "band", [Band(1.0), Band(1.0, causal=True, offset=-2), Band(1.0, causal=True, window=3)]
)
def test_scores_that_are_all_minus_infinity_are_no_dead_row(band):
    """A model that has diverged must not look as if it saw nothing; what sees nothing is zero."""
    query, key = (sign * torch.full((1, 1, 6, 16), 1e20, device=DEVICE) for sign in (-1.0, 1.0))
    value, cotangent = (torch.randn(1, 1, 6, 16, device=DEVICE) for _ in range(2))
    outputs = []
    for operators in (OPERATORS, CustomOperators()):
        out, lse = operators.forward(query, key, value, band)
        grads = operators.vjp(query, key, value, out, lse, cotangent, band)
        outputs.append([torch.isnan(t) for t in (out, *grads)])
    (out, *grads), (expected, *leaking) = outputs
    assert torch.equal(out, expected)
    assert out.any()
    assert out.all() == (band.offset == 0)
    for found, allowed in zip(grads, leaking, strict=True):
        assert found.any()
        assert not (found & ~allowed).any()


@pytest.mark.parametrize("wrong", ["key", "value", "cotangent", "heads"])
def test_operands_that_do_not_fit_are_refused(wrong):
    shapes = {"query": (1, 3, 4, 8), "key": (1, 3, 5, 8), "value": (1, 3, 5, 8), "cotangent": (1, 3, 4, 8)}
    shapes |= {"key": {"key": (1, 3, 5, 4)}, "value": {"value": (1, 3, 6, 8)}}.get(wrong, {})
    shapes |= {"cotangent": {"cotangent": (1, 3, 2, 8)}}.get(wrong, {})
    if wrong == "heads":
        shapes |= {"key": (1, 2, 5, 8), "value": (1, 2, 5, 8)}
    query, key, value, cotangent = (torch.randn(shape, device=DEVICE) for shape in shapes.values())
    out, lse = torch.zeros(1, 3, 4, 8, device=DEVICE), torch.zeros(1, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"it supports query \(batch, heads, queries, dim\)"):
        support.check((query, key, value, cotangent), saved=(out, lse))


def test_what_autograd_batches_by_itself_is_refused_in_words():
    leaves = [torch.randn(1, 1, 4, 8, device=DEVICE).requires_grad_() for _ in range(3)]
    out = scaled_dot_product_attention(*leaves, backend="triton_fused")
    with pytest.raises(ValueError, match=r"memory of their own, .* use torch\.func\.vmap"):
        torch.autograd.grad(out, leaves, torch.randn(2, *out.shape, device=DEVICE), is_grads_batched=True)


def test_a_compilation_that_fails_leaves_the_compiler_as_it_was(monkeypatch):
    class Broken:
        def warmup(self, *_, **__):
            raise RuntimeError("no compiler")

    jobs = {name: compilation.Job(Broken(), (1,), (), {}) for name in ("vjp_rows", "vjp_columns")}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler"):
            compilation.compile_together(jobs, torch.device("cpu"))


def test_values_that_are_equal_pass_through_rounded_weights():
    operands = Operands.draw((1, 2, 2, 96, 96, 16, 16), torch.float16)
    out, _ = OPERATORS.forward(
        operands.query, operands.key, torch.full_like(operands.value, 11.0), Band(0.25)
    )
    torch.testing.assert_close(out, torch.full_like(out, 11.0), rtol=1e-6, atol=0)


def test_thirds_add_up_to_a_float32_exactly():
    exponents = torch.randint(-100, 127, (1000,)).float()  # below, the last part is no normal number
    values = torch.cat([(1 + torch.rand(1000)) * exponents.exp2(), torch.zeros(24)])
    values, parts = values.to(DEVICE), torch.empty(3, 1024, device=DEVICE)
    thirds_of_a_row[(1,)](values, parts)
    assert torch.equal(parts.double().sum(0), values.double())
    assert torch.equal(parts.bfloat16().float(), parts)


@triton.jit
def thirds_of_a_row(values, parts):
    index = tl.arange(0, 1024)
    high, middle, low = thirds(tl.load(values + index))
    tl.store(parts + index, high.to(tl.float32))
    tl.store(parts + 1024 + index, middle.to(tl.float32))
    tl.store(parts + 2048 + index, low.to(tl.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(RMS))
def test_fifty_repeats_give_equal_bits(dtype):
    band = Band(0.125, causal=True)
    operands = Operands.draw((2, 8, 4, 700, 700, 64, 64), dtype)
    first = operands.outputs(OPERATORS, band)
    for _ in range(50):
        repeated = operands.outputs(OPERATORS, band)
        assert all(torch.equal(repeated[name], first[name]) for name in first)


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_second_derivative():
    operands = Operands.draw((1, 2, 2, 200, 200, 32, 32), torch.float32)
    inputs = operands.query, operands.key, operands.value
    attention = attention_of(OPERATORS, Band(0.2, causal=True))

    def work() -> list[Tensor]:
        return reverse(attention, inputs, operands.directions, 2)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for tensor in inputs:
        tensor.mul_(1.5)
    graph.replay()
    for found, expected in zip(captured, work(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_more_heads_than_a_grid_axis_holds():
    operands = Operands.draw((35_000, 2, 1, 3, 5, 16, 16), torch.float32)
    found = operands.outputs(OPERATORS, Band(0.3))
    for name, value in operands.map(Tensor.double).outputs(FORMULAS, Band(0.3)).items():
        assert relative(found[name], value) <= 2e-6, name


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    band = Band(0.3, causal=True)
    operands = Operands.draw((2, 2, 2, 33, 33, 16, 16), torch.bfloat16)
    expected = operands.outputs(OPERATORS, band)
    far = 2**31 // 32 + 64
    strides = itertools.cycle([(16, 32, far, 1), (far * 33, 16, 64, 1), (16, 32, 64, far)])

    def spread(tensor: Tensor) -> Tensor:
        stride = next(strides)
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, stride, strict=True))
        memory = torch.empty(extent, dtype=tensor.dtype, device=DEVICE)
        return memory.as_strided(tensor.shape, stride).copy_(tensor)

    for name, value in operands.map(spread).outputs(OPERATORS, band).items():
        assert relative(value, expected[name].double()) <= 1e-3, name  # roundings of sums in another order


@pytest.mark.gpu
@pytest.mark.parametrize(
    "way", [lambda f, x, t: reverse(f, x, t, 2), forward_twice], ids=["reverse", "forward"]
)
def test_memory_of_the_second_derivative_is_linear_in_length(way):
    peaks = []
    for length in (2048, 4096):
        operands = Operands.draw((1, 4, 4, length, length, 64, 64), torch.bfloat16)
        inputs = operands.query, operands.key, operands.value
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way(attention_of(OPERATORS, Band(0.125, causal=True)), inputs, tuple(operands.directions))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[1] < 4 * 4096 * 4096  # one byte for each score of each head


@pytest.mark.gpu
@pytest.mark.usefixtures("forbidden_formulas")
@pytest.mark.parametrize("steps", [1, 5, 10, 20])
def test_full_meta_gradient_at_the_studys_size(steps):
    assert meta_gradient_error(steps, tasks=16, batch=16, length=32) <= 2e-6
