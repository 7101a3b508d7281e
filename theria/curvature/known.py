"""The attention implementations people use, each as the audit can call it, or why it is absent here."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from theria.attention import available_backends, scaled_dot_product_attention
from theria.attention.call import AttentionCall
from theria.attention.registry import refusal
from theria.curvature.cases import SMALL_CASES, Case
from theria.curvature.convention import Convention
from theria.curvature.learning import SMALL_TASK, MetaTask

_TORCH = Convention("heads_first", causal_argument="is_causal")


@dataclass(frozen=True)
class Implementation:
    """An implementation by name.

    Attributes:
        name: as in reports.
        function: the callable; None where it is absent.
        convention: how to call it; None to find out.
        absent: why it cannot be asked here, with what would have to be so.
        cases, task: sizes it can be asked at; None for the audit's own.
        note: what a reader of its figures has to know.
    """

    name: str
    function: Callable[..., Any] | None = None
    convention: Convention | None = None
    absent: str = ""
    cases: Sequence[Case] | None = None
    task: MetaTask | None = None
    note: str = ""


def known_implementations(device: torch.device | str, dtype: torch.dtype) -> tuple[Implementation, ...]:
    """theria's backends, PyTorch's, FlexAttention, and third parties' where they are installed.

    A dtype or device that an implementation refuses is for the audit to find out; absent is what this
    process does not have at all.
    """
    device = torch.device(device)
    return (
        *(theria_backend(name, device, dtype) for name in ("reference", "custom", "triton_fused")),
        *(
            Implementation(f"torch {kernel}", partial(_torch_kernel, backend=backend), _TORCH)
            for kernel, backend in (
                ("MATH", SDPBackend.MATH),
                ("FLASH", SDPBackend.FLASH_ATTENTION),
                ("EFFICIENT", SDPBackend.EFFICIENT_ATTENTION),
                ("CUDNN", SDPBackend.CUDNN_ATTENTION),
            )
        ),
        _flex(device),
        _installed("flash-attn", "flash_attn", "flash_attn_func"),
        _xformers(),
        _installed("flash-linear-attention (parallel_attn)", "fla.ops.attn", "parallel_attn"),
    )


def theria_backend(name: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    """One of theria's; the Triton kernels on a CPU only under the interpreter, and at small sizes."""
    label = f"theria {name}"
    if name not in available_backends():
        return Implementation(label, absent="not in this build: Triton is not installed")
    function = partial(scaled_dot_product_attention, backend=name)
    if name != "triton_fused" or device.type == "cuda":
        return Implementation(label, function, _TORCH)
    shape = (1, 1, 16, 16)
    call = AttentionCall(
        shape, shape, shape, torch.float32, device, False, None, "upper_left", 0.25, enable_gqa=False
    )
    reason = refusal(name, call)
    if reason is not None:
        return Implementation(label, absent=reason)
    if dtype is torch.bfloat16:
        return Implementation(label, absent="Triton's interpreter truncates bfloat16 where a GPU rounds")
    note = "under Triton's interpreter, at small sizes"
    return Implementation(label, function, _TORCH, cases=SMALL_CASES, task=SMALL_TASK, note=note)


def versions() -> str:
    """Versions of everything installed that could matter to the figures."""
    packages = ("torch", "triton", "flash-attn", "xformers", "flash-linear-attention")
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, backend: SDPBackend
) -> Tensor:
    """PyTorch's function held to one kernel; its reasons for a refusal are warnings, and join the error."""
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(backend):
        warnings.simplefilter("always")
        try:
            return torch_attention(query, key, value, is_causal=is_causal)
        except RuntimeError as error:
            reasons = "; ".join(dict.fromkeys(str(w.message).split(" (Triggered")[0] for w in said))
            raise RuntimeError(f"{error} {reasons}".strip()) from error


def _flex(device: torch.device) -> Implementation:
    """Compiled on a GPU, as it is meant to be used, and then at few sizes, as each takes long to compile."""
    if device.type != "cuda":
        return Implementation("torch FlexAttention", partial(_flex_attention, flex_attention), _TORCH)
    cases = (
        Case(1, 2, 128, 128, 64),
        Case(1, 2, 128, 128, 64, causal=True),
        Case(1, 2, 200, 200, 64, causal=True, strided=True),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return Implementation(
        "torch FlexAttention", partial(_flex_attention, compiled), _TORCH, cases=cases, note="compiled"
    )


def _flex_attention(
    flex: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False
) -> Tensor:
    mask = None
    if is_causal:
        mask = create_block_mask(_causal, None, None, query.shape[-2], key.shape[-2], device=query.device)
    with warnings.catch_warnings():
        # said of every uncompiled call: that it is slow
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex(query, key, value, block_mask=mask)


# FlexAttention counts the parameters, and compiles anew for every other function that it is given
@no_type_check
def _causal(batch, head, query_index, key_index):
    return query_index >= key_index


def _installed(name: str, module: str, function: str) -> Implementation:
    """A third party's function, if its package is installed and imports."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        return Implementation(name, absent=f"the package {package} is not installed")
    try:
        return Implementation(name, getattr(import_module(module), function))
    except (ImportError, AttributeError, OSError) as error:
        # compiled extensions fail to load in these ways where they do not fit the machine
        return Implementation(name, absent=f"{module}.{function} does not import: {error}")


def _xformers() -> Implementation:
    """Its causal mask is an object, not a flag."""
    name = "xformers"
    found = _installed(name, "xformers.ops", "memory_efficient_attention")
    masks = _installed(name, "xformers.ops", "LowerTriangularMask")
    if found.function is None or masks.function is None:
        return Implementation(name, absent=found.absent or masks.absent)
    kernel, triangle = found.function, masks.function

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        return kernel(query, key, value, attn_bias=triangle() if is_causal else None)

    return Implementation(name, attend, Convention("heads_last", causal_argument="is_causal"))
