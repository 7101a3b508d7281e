"""Verdicts: sound implementations are never accused, and those that hide their fault are found."""

import math
import time
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from theria.attention import available_backends, scaled_dot_product_attention
from theria.curvature import Case, MetaTask, Status, Verdict, audit
from theria.curvature.cases import SMALL_CASES
from theria.tasks.synthetic_seqcls import SeqClsSpec

REFERENCE = partial(scaled_dot_product_attention, backend="reference")
TASK = MetaTask(SeqClsSpec(length=6, width=8, num_classes=3, support_size=3, query_size=3), tasks=3)
BRIEFLY = {"inner_steps": (1,), "steps": 1, "task": TASK}


def torch_math(query, key, value, is_causal=False):
    with sdpa_kernel(SDPBackend.MATH):
        return torch_attention(query, key, value, is_causal=is_causal)


SOUND = {
    "reference": REFERENCE,
    "custom": partial(scaled_dot_product_attention, backend="custom"),
    "torch MATH": torch_math,
}
# the same examples in every run; a failing one is small as it is
SEARCH = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
CASES = st.builds(
    Case,
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    dim=st.integers(1, 64),
    causal=st.booleans(),
    magnitude=st.sampled_from([0.1, 1.0, 3.0]),
    strided=st.booleans(),
    uniform_cotangent=st.booleans(),
)


@pytest.mark.slow
@settings(SEARCH, max_examples=200)
@given(
    name=st.sampled_from(list(SOUND)),
    case=CASES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_no_sound_implementation_is_accused(name, case, dtype, seed):
    report = audit(SOUND[name], cases=[case], dtype=dtype, seed=seed, inner_steps=())
    assert report.verdict is Verdict.SAFE, report.findings
    assert report.status is Status.OK


@pytest.mark.skipif("triton_fused" not in available_backends(), reason="Triton is not installed")
# what kernels compute in rows that are padding and not stored
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")
@settings(SEARCH, max_examples=4)
@given(
    queries=st.integers(1, 20),
    keys=st.integers(1, 20),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_nor_are_the_triton_kernels(queries, keys, causal, dtype, seed):
    report = audit(
        partial(scaled_dot_product_attention, backend="triton_fused"),
        cases=[Case(1, 1, queries, keys, 16, causal=causal)],
        dtype=dtype,
        seed=seed,
        inner_steps=(),
    )
    assert report.verdict is Verdict.SAFE, report.findings


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("reference", torch.float32), ("custom", torch.bfloat16), ("torch MATH", torch.float16)],
)
def test_nor_with_everything_that_an_audit_asks(name, dtype):
    report = audit(SOUND[name], dtype=dtype, **BRIEFLY)
    assert report.verdict is Verdict.SAFE, report.findings
    assert report.attn_second_order_ok
    assert report.collapsed == ()
    assert all(share == pytest.approx(1, abs=0.02) for share in report.surviving.values())


def test_a_full_audit_takes_seconds():
    # of this process, which computes on one thread: what else the machine does is not counted
    start = time.process_time()
    report = audit(SOUND["custom"])
    assert time.process_time() - start < 10
    assert report.verdict is Verdict.SAFE
    assert [depth.inner_steps for depth in report.depths] == [1, 5]
    assert all(len(depth.probes) == 5 for depth in report.depths)


class Raw(Function):
    """The reference with gradients that come back without a graph."""

    @staticmethod
    def forward(ctx, query, key, value, causal):
        ctx.save_for_backward(query, key, value)
        ctx.causal = causal
        return REFERENCE(query, key, value, is_causal=causal)

    @staticmethod
    def backward(ctx, cotangent):
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = REFERENCE(*leaves, is_causal=ctx.causal)
        return *torch.autograd.grad(out, leaves, cotangent.detach()), None


def raw_where(condition):
    """Attention that loses its curvature under a condition."""

    def attend(query, key, value, is_causal=False):
        if condition(query, key, value, is_causal):
            return Raw.apply(query, key, value, is_causal)
        return REFERENCE(query, key, value, is_causal=is_causal)

    return attend


def largest_score(query, key):
    return (query @ key.mT).abs().max() * query.shape[-1] ** -0.5


def every(n):
    calls = [0]

    def due(*_):
        calls[0] += 1
        return calls[0] % n == 0

    return due


@pytest.mark.parametrize(
    "condition",
    [
        pytest.param(lambda q, k, v, causal: causal, id="under a causal mask"),
        pytest.param(lambda q, k, v, causal: q.shape != k.shape, id="as queries and keys differ"),
        pytest.param(lambda q, k, v, causal: q.shape == k.shape, id="for squares"),
        pytest.param(lambda q, k, v, causal: q.shape[2] == 1, id="for one query"),
        pytest.param(lambda q, k, v, causal: k.shape[2] > 128, id="beyond a length"),
        pytest.param(lambda q, k, v, causal: largest_score(q, k) > 15, id="for a peaked softmax"),
        pytest.param(lambda q, k, v, causal: largest_score(q, k) < 0.5, id="for a flat softmax"),
        pytest.param(lambda q, k, v, causal: not q.is_contiguous(), id="for strided inputs"),
        pytest.param(lambda q, k, v, causal: q.shape[0] * q.shape[1] > 8, id="for many heads"),
        pytest.param(lambda q, k, v, causal: not q.is_leaf, id="inside a model"),
        pytest.param(lambda q, k, v, causal: q.shape[-1] == 24, id="for a width that is no power of two"),
        pytest.param(every(2), id="at every second call"),
    ],
)
def test_curvature_that_is_lost_at_times_is_a_silent_collapse(condition):
    report = audit(raw_where(condition), **BRIEFLY)
    assert report.verdict is Verdict.SILENT_COLLAPSE
    assert set(report.collapsed) >= {"query", "key", "value"}


def formula(cut):
    """Attention with a differentiable backward of our own, whose ingredients ``cut`` may cut."""

    class Formula(Function):
        @staticmethod
        def forward(ctx, query, key, value, causal):
            ctx.save_for_backward(query, key, value)
            ctx.causal = causal
            return REFERENCE(query, key, value, is_causal=causal)

        @staticmethod
        def backward(ctx, cotangent):
            def gradients(q, k, v, do):
                scores = q @ k.mT * q.shape[-1] ** -0.5
                if ctx.causal:
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
                p = scores.softmax(-1)
                dp = do @ v.mT
                ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
                return ds @ k, ds.mT @ q, p.mT @ do

            return *cut(gradients, *ctx.saved_tensors, cotangent), None

    def attend(query, key, value, is_causal=False):
        return Formula.apply(query, key, value, is_causal)

    return attend


def silently(x):
    return x.detach() + 0 * x


def lose_cross_terms(gradients, q, k, v, do):
    return gradients(q, k.detach(), v, do)[0], gradients(q.detach(), k, v, do)[1], gradients(q, k, v, do)[2]


def lose_the_cotangent(gradients, q, k, v, do):
    return gradients(q, k, v, silently(do))


def lose_all_at_a_constant_cotangent(gradients, q, k, v, do):
    found = gradients(q, k, v, do)
    return found if do.requires_grad else [t.detach() for t in found]


def become_nan(gradients, q, k, v, do):
    return [g * torch.where(torch.ones_like(g) > 0, 1, torch.sqrt(g - g)) for g in gradients(q, k, v, do)]


def lose_one(index):
    """One input's own gradient comes without a graph."""

    def cut(gradients, *args):
        found = list(gradients(*args))
        found[index] = silently(found[index])
        return found

    return cut


def lose_the_key_in_the_querys_gradient(gradients, q, k, v, do):
    return gradients(q, silently(k), v, do)[0], *gradients(q, k, v, do)[1:]


@pytest.mark.parametrize(
    ("cut", "verdict", "collapsed"),
    [
        (lambda gradients, *args: gradients(*args), Verdict.SAFE, ()),
        (lose_one(0), Verdict.SILENT_COLLAPSE, ("query",)),
        (lose_one(1), Verdict.SILENT_COLLAPSE, ("key",)),
        (lose_one(2), Verdict.SILENT_COLLAPSE, ("value",)),
        (lose_the_key_in_the_querys_gradient, Verdict.WRONG_CURVATURE, ()),
        (lose_cross_terms, Verdict.WRONG_CURVATURE, ()),
        (lose_the_cotangent, Verdict.SILENT_COLLAPSE, ("cotangent",)),
        (lose_all_at_a_constant_cotangent, Verdict.SILENT_COLLAPSE, ("query", "key", "value")),
        (become_nan, Verdict.WRONG_CURVATURE, ()),
    ],
)
def test_curvature_that_is_lost_in_part(cut, verdict, collapsed):
    report = audit(formula(cut), **BRIEFLY)
    assert report.verdict is verdict
    assert report.collapsed == collapsed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_input_that_lost_its_gradients_graph_is_named_in_half_precision_too(index, dtype):
    attend = formula(lose_one(index))

    def rounded(query, key, value, is_causal=False):
        return attend(query.float(), key.float(), value.float(), is_causal).to(query.dtype)

    report = audit(rounded, dtype=dtype, inner_steps=())
    assert report.verdict is Verdict.SILENT_COLLAPSE
    assert report.collapsed == (("query", "key", "value")[index],)


class Scaled(Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return ctx.factor * cotangent, None


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [
        (1.0, Verdict.SAFE),
        (1.002, Verdict.WRONG_CURVATURE),
        (0.5, Verdict.WRONG_CURVATURE),
        (0.15, Verdict.WRONG_CURVATURE),
        (0.05, Verdict.SILENT_COLLAPSE),
        (-1.0, Verdict.SILENT_COLLAPSE),
    ],
)
def test_curvature_of_another_size(factor, verdict):
    def cut(gradients, q, k, v, do):
        return gradients(*(Scaled.apply(t, factor) for t in (q, k, v)), do)

    report = audit(formula(cut), inner_steps=())
    assert report.verdict is verdict
    if factor < 1:
        assert report.surviving["query"] == pytest.approx(factor, abs=1e-3)


def test_a_finding_names_the_derivative_that_is_wrong():
    report = audit(formula(lose_the_key_in_the_querys_gradient), inner_steps=())
    assert report.findings[0].text.startswith("hvp, key along query off by 1,")


def one_alone(query, key, value, causal):
    return sum(t.requires_grad for t in (query, key, value)) == 1


@pytest.mark.parametrize("condition", [every(7), one_alone])
def test_rarer_losses_are_wrong_curvature(condition):
    assert audit(raw_where(condition), **BRIEFLY).verdict is Verdict.WRONG_CURVATURE


class ZeroTangent(Function):
    """The reference, with a forward mode that answers zero."""

    @staticmethod
    def forward(query, key, value, causal):
        return REFERENCE(query, key, value, is_causal=causal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.causal = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, cotangent):
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = REFERENCE(*leaves, is_causal=ctx.causal)
            return *torch.autograd.grad(out, leaves, cotangent, create_graph=True), None

    @staticmethod
    def jvp(ctx, *tangents):
        return torch.zeros_like(ctx.saved_tensors[0])


def test_a_forward_mode_that_lies_is_a_wrong_gradient():
    def attend(query, key, value, is_causal=False):
        return ZeroTangent.apply(query, key, value, is_causal)

    report = audit(attend, **BRIEFLY)
    assert report.verdict is Verdict.WRONG_GRADIENT
    assert report.worst("jvp").relative == pytest.approx(1)
    assert report.worst("vjp").of_allowed < 1


class PackedCotangent(Function):
    """The identity, whose backward takes an expanded cotangent for twice what it is."""

    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent if 0 in cotangent.stride() else cotangent.clone()


def test_strides_that_a_backward_mistakes_are_a_wrong_gradient():
    def attend(query, key, value, is_causal=False):
        return PackedCotangent.apply(REFERENCE(query, key, value, is_causal=is_causal))

    assert audit(attend, **BRIEFLY).verdict is Verdict.WRONG_GRADIENT


def test_inputs_written_to_and_outputs_of_another_shape_are_a_wrong_forward():
    def writes(query, key, value, is_causal=False):
        out = REFERENCE(query, key, value, is_causal=is_causal)
        key.data.mul_(2)
        return out

    def truncates(query, key, value, is_causal=False):
        out = REFERENCE(query, key, value, is_causal=is_causal)
        return out[:, :, :-1] if is_causal else out

    def halves(query, key, value, is_causal=False):
        return REFERENCE(query, key, value, is_causal=is_causal).half()

    functions = {
        writes: "writes into its input key",
        truncates: "has shape",
        halves: "is of torch.float16 instead of torch.float32",
    }
    for function, complaint in functions.items():
        report = audit(function, **BRIEFLY)
        assert report.verdict is Verdict.WRONG_FORWARD
        assert complaint in report.findings[0].text


def test_noise_is_a_wrong_forward():
    def noisy(query, key, value, is_causal=False):
        return REFERENCE(query, key, value, is_causal=is_causal) + 0.01 * torch.randn_like(query)

    assert audit(noisy, inner_steps=()).verdict is Verdict.WRONG_FORWARD


def test_a_module_with_parameters_of_its_own_is_sound_and_they_get_no_gradient():
    class Gain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = (torch.nn.Parameter(torch.ones(())) for _ in range(2))

        def forward(self, query, key, value, is_causal=False):
            return self.used * REFERENCE(query, key, value, is_causal=is_causal)

    gain = Gain()
    assert audit(gain, **BRIEFLY).verdict is Verdict.SAFE
    assert gain.used.grad is None
    assert gain.unused.grad is None


def test_a_rounding_too_many_is_a_wrong_forward_in_float32():
    def rounds(query, key, value, is_causal=False):
        return REFERENCE(query.bfloat16().float(), key, value, is_causal=is_causal)

    assert audit(rounds, inner_steps=()).verdict is Verdict.WRONG_FORWARD


def test_an_implementation_that_raises_is_a_hard_failure_with_its_error():
    def refuses(query, key, value, is_causal=False):
        raise RuntimeError("no kernel for this dtype\nand more")

    report = audit(refuses, **BRIEFLY)
    assert (report.verdict, report.status) == (Verdict.HARD_FAIL, Status.HARD_FAIL_OTHER)
    assert report.failure.error == "RuntimeError: no kernel for this dtype"


def test_calls_that_are_refused_are_left_out_as_long_as_some_are_taken():
    def one_width(query, key, value, is_causal=False):
        if query.shape[-1] != 16 or query.shape != key.shape:
            raise NotImplementedError("squares of width 16")
        return REFERENCE(query, key, value, is_causal=is_causal)

    report = audit(one_width, **BRIEFLY)
    assert report.verdict is Verdict.SAFE
    assert 0 < sum(bool(case.refused) for case in report.cases) < len(report.cases)
    assert report.depths[0].failure.order == 0


def test_second_order_that_raises_in_one_case_is_first_order_only():
    class Refuses(Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, cotangent):
            return cotangent

    def attend(query, key, value, is_causal=False):
        out = REFERENCE(query, key, value, is_causal=is_causal)
        return Refuses.apply(out) if is_causal else out

    report = audit(attend, **BRIEFLY)
    assert (report.verdict, report.status) == (Verdict.FIRST_ORDER_ONLY, Status.HARD_FAIL_ONCE_DIFF)
    assert not report.attn_second_order_ok


def test_nothing_to_probe_is_an_error():
    with pytest.raises(ValueError, match="nothing to probe"):
        audit(REFERENCE, cases=[], inner_steps=())


def test_the_callers_modes_do_not_matter_and_stay():
    threads = torch.get_num_threads()
    with torch.no_grad():
        assert audit(REFERENCE, cases=SMALL_CASES[:1], **BRIEFLY).verdict is Verdict.SAFE
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert audit(REFERENCE, cases=SMALL_CASES[:1], **BRIEFLY).verdict is Verdict.SAFE
        assert torch.is_inference_mode_enabled()
    assert torch.get_num_threads() == threads


def test_verdicts_are_ordered():
    assert Verdict.HARD_FAIL.reaches(Verdict.WRONG_CURVATURE)
    assert Verdict.WRONG_CURVATURE.reaches(Verdict.WRONG_CURVATURE)
    assert not Verdict.SAFE.reaches(Verdict.WRONG_CURVATURE)
    assert not Verdict.WRONG_FORWARD.reaches(Verdict.SILENT_COLLAPSE)
