"""The implementations people use: which there are, how they are called, and what they are on a CPU."""

import sys
import types
import warnings
from functools import partial

import pytest
import torch

from theria.attention import available_backends, scaled_dot_product_attention
from theria.curvature import Case, Convention, Verdict, audit
from theria.curvature.known import known_implementations, theria_backend, versions

CASES = (Case(1, 2, 9, 9, 16), Case(1, 2, 9, 9, 16, causal=True))


def by_name(device="cpu", dtype=torch.float32):
    return {found.name: found for found in known_implementations(device, dtype)}


def test_all_are_listed_and_those_not_installed_say_so():
    found = by_name()
    assert list(found) == [
        *(f"theria {name}" for name in ("reference", "custom", "triton_fused")),
        *(f"torch {name}" for name in ("MATH", "FLASH", "EFFICIENT", "CUDNN", "FlexAttention")),
        "flash-attn",
        "xformers",
        "flash-linear-attention (parallel_attn)",
    ]
    for implementation in found.values():
        assert (implementation.function is None) == bool(implementation.absent)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("theria reference", Verdict.SAFE),
        ("theria custom", Verdict.SAFE),
        ("torch MATH", Verdict.SAFE),
        ("torch FLASH", Verdict.FIRST_ORDER_ONLY),
        ("torch EFFICIENT", Verdict.HARD_FAIL),
        ("torch CUDNN", Verdict.HARD_FAIL),
        ("torch FlexAttention", Verdict.HARD_FAIL),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verdicts_on_a_cpu(name, verdict, dtype):
    implementation = by_name(dtype=dtype)[name]
    with warnings.catch_warnings():
        # compiling FlexAttention makes torch import what it deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        report = audit(
            implementation.function,
            convention=implementation.convention,
            cases=CASES,
            dtype=dtype,
            inner_steps=(),
        )
    assert report.verdict is verdict, report.findings
    assert report.verdict is Verdict.SAFE or report.failure.error


def test_a_refusal_carries_the_reasons_that_torch_warns_of(monkeypatch):
    def refuses(query, key, value, is_causal):
        warnings.warn("Flash attention needs a GPU (Triggered internally at x.cpp)", stacklevel=1)
        raise RuntimeError("No available kernel.")

    monkeypatch.setattr("theria.curvature.known.torch_attention", refuses)
    kernel = by_name()["torch FLASH"].function
    with pytest.raises(RuntimeError, match=r"^No available kernel\. Flash attention needs a GPU$"):
        kernel(*(torch.ones(1, 1, 2, 2) for _ in range(3)))


@pytest.mark.skipif("triton_fused" not in available_backends(), reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
def test_interpreted_kernels_are_asked_little_and_not_what_the_interpreter_gets_wrong():
    found = theria_backend("triton_fused", torch.device("cpu"), torch.float32)
    assert "interpreter" in found.note
    assert max(case.keys for case in found.cases) <= 70
    assert "truncates bfloat16" in theria_backend("triton_fused", torch.device("cpu"), torch.bfloat16).absent
    assert theria_backend("triton_fused", torch.device("cuda"), torch.bfloat16).note == ""


def installed(monkeypatch, name, **attributes):
    """Make a package importable, with all the packages it stands in."""
    parts = name.split(".")
    for i in range(len(parts)):
        module = types.ModuleType(".".join(parts[: i + 1]))
        module.__spec__ = types.SimpleNamespace(name=module.__name__)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for attribute, value in attributes.items():
        setattr(sys.modules[name], attribute, value)


def heads_last(q, k, v, causal, alignment="lower_right"):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(
        q, k, v, is_causal=causal, causal_alignment=alignment, backend="reference"
    ).transpose(1, 2)


def test_third_parties_are_called_as_they_want_to_be(monkeypatch):
    """By stand-ins with their signatures: the packages themselves need a GPU."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        return heads_last(q, k, v, causal)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert attn_bias is None or isinstance(attn_bias, Triangle)
        return heads_last(query, key, value, attn_bias is not None, "upper_left")

    class Triangle:
        pass

    def parallel_attn(q, k, v, g=None, scale=None, window_size=None, cu_seqlens=None, **kwargs):
        return heads_last(q, k, v, causal=True)

    installed(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    installed(
        monkeypatch,
        "xformers.ops",
        memory_efficient_attention=memory_efficient_attention,
        LowerTriangularMask=Triangle,
    )
    installed(monkeypatch, "fla.ops.attn", parallel_attn=parallel_attn)
    found = by_name()
    conventions = {
        "flash-attn": Convention("heads_last", "causal", "softmax_scale", alignment="lower_right"),
        "xformers": Convention("heads_last", "is_causal"),
        "flash-linear-attention (parallel_attn)": Convention(
            "heads_last", None, "scale", always_causal=True, alignment="lower_right"
        ),
    }
    for name, convention in conventions.items():
        report = audit(found[name].function, convention=found[name].convention, cases=CASES, inner_steps=())
        assert report.convention == convention
        assert report.verdict is Verdict.SAFE, report.findings


def test_a_package_that_does_not_load_is_absent_with_its_error(monkeypatch):
    installed(monkeypatch, "flash_attn")
    assert by_name()["flash-attn"].absent.startswith("flash_attn.flash_attn_func does not import:")


def test_versions_name_what_is_installed():
    assert f"torch {torch.__version__}" in versions()


def test_flex_attention_is_attention():
    attend = partial(by_name()["torch FlexAttention"].function)
    inputs = [torch.randn(1, 2, 17, 16) for _ in range(3)]
    for causal in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = attend(*inputs, is_causal=causal)
        expected = scaled_dot_product_attention(*inputs, is_causal=causal, backend="reference")
        torch.testing.assert_close(out, expected)
