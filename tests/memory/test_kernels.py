"""Which kernel a call takes, and that flash-linear-attention is called so that its answers are ours.

The package runs on GPUs alone. On the CPU, stand-ins of its three functions, loops over tokens written from
its documentation, check the layouts, resets and states that it is given; on a GPU it is compared itself.
"""

import importlib
import sys
import warnings
from types import ModuleType

import pytest
import torch

from theria.memory import AssociativeMemory, AssociativeState, accumulator, causal_projection, fla_kernels
from theria.memory import resolve_kernel as resolve

RULES = pytest.mark.parametrize("rule", ["hebbian", "delta", "gated_delta"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])


def options(rule, a):
    return {"beta": a.beta, "log_decay": a.log_decay if rule == "gated_delta" else None}


def assert_close(found, expected):
    assert (found - expected).norm() < 1e-5 * expected.norm()


def stand_in(delta):
    """(batch, length, heads, ...) in, reads and (batch, heads, key_dim, value_dim) out, a token at a time."""

    def kernel(q, k, v, *, scale, initial_state, output_final_state, chunk_size, g=None, beta=None):
        assert output_final_state
        assert chunk_size in (16, 32, 64)
        assert initial_state.dtype == torch.float32
        assert g is None or g.dtype == torch.float32
        assert (beta is not None) == delta
        state, reads = initial_state, []
        for t in range(q.shape[1]):
            if g is not None:
                state = state * g[:, t, :, None, None].exp()
            key, value = k[:, t].float(), v[:, t].float()
            if delta:
                value = beta[:, t, :, None] * (value - (state * key[..., None]).sum(-2))
            state = state + key[..., None] * value[..., None, :]
            reads.append((state * (scale * q[:, t].float())[..., None]).sum(-2))
        return torch.stack(reads, dim=1).to(q.dtype), state

    return kernel


@pytest.fixture
def package(monkeypatch):
    """The functions of the package that are called, in order, each the stand-in of one; on any device."""
    called = []
    for module_name, name, delta in (
        ("simple_gla", "chunk_simple_gla", False),
        ("delta_rule", "chunk_delta_rule", True),
        ("gated_delta_rule", "chunk_gated_delta_rule", True),
    ):
        kernel = stand_in(delta)

        def record(q, k, v, *, name=name, kernel=kernel, **arguments):
            called.append(name)
            assert (name == "chunk_delta_rule") <= ("g" not in arguments)
            assert (name == "chunk_gated_delta_rule") <= ("g" in arguments)
            return kernel(q, k, v, **arguments)

        module = ModuleType(module_name)
        setattr(module, name, record)
        monkeypatch.setitem(sys.modules, f"fla.ops.{module_name}", module)
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setattr(accumulator, "refusal", lambda *call: None)
    return called


EXPECTED = {
    "hebbian": "chunk_simple_gla",
    "delta": "chunk_delta_rule",
    "gated_delta": "chunk_gated_delta_rule",
}


@RULES
@PACKED
def test_the_memory_through_the_package_is_the_tensor_form(draw, package, rule, packed):
    a = draw(length=70, dtype=torch.float32, boundaries=0.1)
    ids = a.segment_ids - 7 if packed else None
    torch.manual_seed(0)
    start = AssociativeState(torch.randn(2, 2, 4, 5))

    def both(kernel):
        leaves = [t.clone().requires_grad_() for t in (a.q, a.k, a.v, start.memory)]
        read, state = AssociativeMemory(rule, kernel=kernel, chunk_size=16)(
            *leaves[:3], segment_ids=ids, state=AssociativeState(leaves[3]), **options(rule, a)
        )
        total = read.square().sum() + state.memory.square().sum()
        return read, state.memory, *torch.autograd.grad(total, leaves)

    for ours, theirs in zip(both("tensor"), both("fla"), strict=True):
        assert_close(theirs, ours)
    # shards need decays, which the plain delta rule has not
    expected = EXPECTED["gated_delta" if packed and rule == "delta" else rule]
    assert package == [expected]


@PACKED
def test_the_projection_through_the_package_is_the_tensor_form(draw, package, packed):
    a = draw(length=70, dtype=torch.float32, boundaries=0.1)
    ids = a.segment_ids if packed else None
    arguments = a.q, a.k, a.m_persistent, a.norm_persistent
    found, state = causal_projection(*arguments, segment_ids=ids, kernel="fla")
    expected, last = causal_projection(*arguments, segment_ids=ids, kernel="tensor")
    assert_close(found, expected)
    assert_close(state.memory, last.memory)
    torch.testing.assert_close(state.norm_sum, last.norm_sum)
    again, _ = causal_projection(*arguments, segment_ids=ids, kernel="fla", state=state)
    expected, _ = causal_projection(*arguments, segment_ids=ids, kernel="tensor", state=last)
    assert_close(again, expected)
    assert package == ["chunk_simple_gla"] * 2


def test_no_gradient_crosses_a_shard_boundary_through_the_package(draw, package):
    a = draw(batch=1, length=40, dtype=torch.float32)
    ids = (torch.arange(40) >= 17).long()[None]
    k = a.k.clone().requires_grad_()
    read, _ = AssociativeMemory("gated_delta", kernel="fla")(
        a.q, k, a.v, segment_ids=ids, **options("gated_delta", a)
    )
    (gradient,) = torch.autograd.grad(read[:, :, 17:].square().sum(), k)
    assert torch.count_nonzero(gradient[:, :, :17]) == 0


def test_the_reset_is_zero_in_float32_and_leaves_a_chunk_s_decays_alone():
    reset = torch.tensor(fla_kernels._RESET)
    assert reset.exp() == 0
    # the kernels' own form: base two, after adding up a chunk
    assert torch.exp2(reset * 1.4426950408889634) == 0
    gates = -0.01 * torch.rand(64)
    summed = torch.cat((reset[None], gates)).cumsum(0)
    error = (summed[1:] - summed[:1]) - gates.double().cumsum(0)
    assert error.abs().max() < 2e-4


def test_half_precision_is_given_on_as_it_is(draw, package, monkeypatch):
    seen = []
    kernel = sys.modules["fla.ops.simple_gla"].chunk_simple_gla

    def spy(q, k, v, **arguments):
        seen.extend((q.dtype, k.dtype, v.dtype))
        return kernel(q, k, v, **arguments)

    monkeypatch.setattr(sys.modules["fla.ops.simple_gla"], "chunk_simple_gla", spy)
    a = draw(length=20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read, state = AssociativeMemory("hebbian", kernel="fla")(a.q, a.k, a.v, beta=a.beta)
    assert seen == [torch.bfloat16] * 3
    assert read.dtype == state.memory.dtype == torch.float32


def test_a_second_derivative_is_refused_and_a_first_is_not(draw, package):
    a = draw(length=20, dtype=torch.float32)
    q = a.q.clone().requires_grad_()
    read, _ = AssociativeMemory("delta", kernel="fla")(q, a.k, a.v)
    with pytest.raises(NotImplementedError, match="no second derivative; use kernel='tensor'"):
        torch.autograd.grad(read.square().sum(), q, create_graph=True)
    read, _ = AssociativeMemory("delta", kernel="fla")(q, a.k, a.v)
    assert torch.autograd.grad(read.square().sum(), q)[0].abs().sum() > 0


def test_auto_takes_the_package_where_it_computes_the_call(package):
    q = torch.zeros(1, 1, 64, 8)
    assert resolve(q, q) == resolve(q, q, kernel="fla") == "fla"
    assert resolve(q, q, kernel="tensor") == "tensor"
    # a step of generation fills no chunk
    assert resolve(q[:, :, :1], q[:, :, :1]) == "tensor"


def test_auto_is_the_tensor_form_on_the_cpu_and_fla_says_why_not(monkeypatch):
    monkeypatch.setattr(fla_kernels, "_installed", lambda: True)
    q = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16)
    assert resolve(q, q) == "tensor"
    with pytest.raises(
        NotImplementedError, match="cannot do this call: they run on CUDA devices, not on cpu"
    ):
        resolve(q, q, kernel="fla")


@pytest.mark.parametrize(
    ("dtype", "key_dim", "chunk_size", "reason"),
    [
        (torch.bfloat16, 256, 64, None),
        (torch.float16, 8, 16, None),
        (torch.float32, 8, 64, "they compute torch.bfloat16 and torch.float16 (autocast included)"),
        (torch.float64, 8, 64, "not torch.float64"),
        (torch.bfloat16, 257, 64, "they support keys up to 256 wide, not 257"),
        (torch.bfloat16, 8, 8, "they support the chunk sizes 16, 32, 64, not 8"),
    ],
)
def test_every_limit_has_its_reason(monkeypatch, dtype, key_dim, chunk_size, reason):
    monkeypatch.setattr(fla_kernels, "_installed", lambda: True)
    monkeypatch.setattr(fla_kernels, "_is_hopper", lambda device: False)
    found = fla_kernels.refusal(dtype, torch.device("cuda"), key_dim, chunk_size)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("hopper", "version", "wrong"),
    [
        (True, (3, 3, 1), False),
        (True, (3, 4, 0), True),
        (True, (3, 6, 0), True),
        (True, (3, 7, 0), True),
        (True, (3, 7, 1), False),
        (False, (3, 6, 0), False),
    ],
)
def test_where_triton_makes_the_gradient_wrong_is_refused(monkeypatch, hopper, version, wrong):
    monkeypatch.setattr(fla_kernels, "_installed", lambda: True)
    monkeypatch.setattr(fla_kernels, "_is_hopper", lambda device: hopper)
    monkeypatch.setattr(fla_kernels, "_triton_version", lambda: version)
    found = fla_kernels.refusal(torch.bfloat16, torch.device("cuda"), 8, 64)
    assert (found is not None) == wrong
    if wrong:
        assert "wrong on Hopper GPUs by Triton 3.4 up to 3.7.1, not included" in found
        assert found.endswith(".".join(map(str, version)))


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(fla_kernels, "_installed", lambda: False)
    found = fla_kernels.refusal(torch.bfloat16, torch.device("cuda"), 8, 64)
    assert found == "flash-linear-attention is not installed; pip install 'theria[fla]'"


def fla_on_a_gpu():
    reason = fla_kernels.refusal(torch.bfloat16, torch.device("cuda"), 64, 64)
    if reason is not None:
        pytest.skip(reason)
    with warnings.catch_warnings():
        # it imports parts of torch that are deprecated
        warnings.simplefilter("ignore")
        for name in ("simple_gla", "delta_rule", "gated_delta_rule"):
            importlib.import_module(f"fla.ops.{name}")


@pytest.mark.gpu
@RULES
@PACKED
@pytest.mark.parametrize(("length", "dim"), [(64, 64), (257, 64), (1000, 256)])
def test_the_package_on_a_gpu_is_the_tensor_form(draw, rule, packed, length, dim):
    fla_on_a_gpu()
    a = draw(length=length, dim=dim, value_dim=dim, dtype=torch.float32, boundaries=0.02)
    ids = a.segment_ids.cuda() - 7 if packed else None
    # what both are given is the same to the bit
    given = [t.bfloat16() for t in (a.q / dim**0.5, a.k, a.v)] + [0.1 * torch.randn(2, 2, dim, dim)]
    own = {n: None if t is None else t.cuda() for n, t in options(rule, a).items()}
    if rule == "gated_delta":
        own["log_decay"] = 0.1 * own["log_decay"]

    def both(kernel):
        leaves = [t.cuda().requires_grad_() for t in given]
        read, state = AssociativeMemory(rule, kernel=kernel)(
            *leaves[:3], segment_ids=ids, state=AssociativeState(leaves[3]), **own
        )
        total = read.float().square().sum() + state.memory.square().sum()
        return read, state.memory, *torch.autograd.grad(total, leaves)

    for name, ours, theirs in zip(
        ("read", "state", "dq", "dk", "dv", "dstate"), both("tensor"), both("fla"), strict=True
    ):
        error = (theirs.float() - ours.float()).norm() / ours.float().norm()
        assert error < 0.02, (name, error)


@pytest.mark.gpu
@RULES
def test_gradients_stop_and_nothing_waits_on_a_gpu(draw, rule):
    fla_on_a_gpu()
    a = draw(batch=2, length=300, dim=64, value_dim=64, dtype=torch.float32)
    ids = (torch.arange(300) >= 130).long().expand(2, -1).cuda()
    memory = AssociativeMemory(rule, kernel="fla")
    own = {n: None if t is None else t.cuda() for n, t in options(rule, a).items()}
    q, k, v = (t.bfloat16().cuda() for t in (a.q, a.k, a.v))
    k = k.requires_grad_()
    torch.autograd.grad(memory(q, k, v, segment_ids=ids, **own)[0].sum(), k)  # tunes and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        read, _ = memory(q, k, v, segment_ids=ids, **own)
        (gradient,) = torch.autograd.grad(read[:, :, 130:].float().square().sum(), k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.count_nonzero(gradient[:, :, :130]) == 0
    assert torch.count_nonzero(gradient[:, :, 130:]) > 0


@pytest.mark.gpu
@PACKED
def test_the_projection_by_the_package_on_a_gpu(draw, packed):
    fla_on_a_gpu()
    a = draw(length=500, dim=64, dtype=torch.float32, boundaries=0.01)
    ids = a.segment_ids.cuda() if packed else None
    arguments = [t.cuda() for t in (a.q.bfloat16(), a.k.bfloat16(), a.m_persistent, a.norm_persistent)]
    found, state = causal_projection(*arguments, segment_ids=ids)
    assert resolve(*arguments[:2]) == "fla"
    expected, last = causal_projection(*arguments, segment_ids=ids, kernel="tensor")
    assert (found.float() - expected.float()).norm() < 0.02 * expected.float().norm()
    assert (state.memory - last.memory).norm() < 0.01 * last.memory.norm()
