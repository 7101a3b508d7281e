"""What the kernels compute, and the words in which they refuse the rest."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from theria.attention.kernels import assembler

MAX_WIDTH = 256
SHARED_MEMORY_OF_WIDE_FLOAT32 = 128 * 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run under Triton's interpreter; it is read when they are decorated."""


def check(operands: Sequence[Tensor], saved: Sequence[Tensor] = ()) -> None:
    """Raise ValueError for what the kernels do not compute; ``saved`` are out and lse."""
    query, _, value, *_ = operands
    reason = refusal(query.dtype, query.device, max(query.shape[-1], value.shape[-1]))
    reason = reason or _lack_of_memory((*operands, *saved)) or _misfit(operands, saved)
    for tensor, dtype in (*((t, query.dtype) for t in operands), *((t, torch.float32) for t in saved)):
        if reason is None and (tensor.dtype != dtype or tensor.device != query.device):
            reason = (
                f"it supports operands of one dtype and device (with out and lse in float32), not "
                f"{tensor.dtype} on {tensor.device} beside {query.dtype} on {query.device}"
            )
    if reason is not None:
        raise ValueError(f"the Triton kernels of attention cannot do this call: {reason}")


def _lack_of_memory(tensors: Sequence[Tensor]) -> str | None:
    """A kernel reads addresses: what torch.autograd batches with vectorize=True has none of its own."""
    for tensor in tensors:
        try:
            tensor.data_ptr()
        except RuntimeError:
            return (
                "it supports tensors with memory of their own, not what torch.autograd's vectorize=True or "
                "is_grads_batched=True puts in their place; use torch.func.vmap, jacrev or jacfwd"
            )
    return None


def _misfit(operands: Sequence[Tensor], saved: Sequence[Tensor]) -> str | None:
    """Kernels do not look beyond the shapes that they are told."""
    shapes = [tuple(tensor.shape) for tensor in operands[:3]]
    if any(len(shape) != 4 for shape in shapes):
        return f"it supports query, key and value of four dimensions, not {shapes}"
    (batch, heads, queries, dim), key, (_, kv_heads, keys, value_dim) = shapes
    fits = key == (batch, kv_heads, keys, dim) and shapes[2][0] == batch and heads % max(kv_heads, 1) == 0
    out = batch, heads, queries, value_dim
    known = [*shapes, out, (batch, heads, queries)]
    others = [tuple(tensor.shape) for tensor in (*operands[3:], *saved)]
    if fits and all(shape in known for shape in others):
        return None
    return (
        "it supports query (batch, heads, queries, dim), key (batch, kv heads, keys, dim), value (batch, "
        "kv heads, keys, value_dim), cotangents and tangents of their shapes or the output's, not "
        f"{', '.join(map(str, (*shapes, *others)))}"
    )


def refusal(dtype: torch.dtype, device: torch.device, width: int) -> str | None:
    """Why there are no kernels for this dtype, device and width, or None where there are."""
    if dtype not in DTYPES:
        return f"it supports {', '.join(map(str, DTYPES))}, not {dtype}"
    if width > MAX_WIDTH:
        return f"it supports widths up to {MAX_WIDTH}, not {width}"
    if device.type == "cuda":
        return assembler.reason_against(device) or _lack_of_shared_memory(dtype, device, width)
    if device.type == "cpu" and INTERPRETED:
        return None
    return (
        f"it supports CUDA devices, and the CPU where TRITON_INTERPRET=1 is set before theria is imported, "
        f"not {device}"
    )


def _lack_of_shared_memory(dtype: torch.dtype, device: torch.device, width: int) -> str | None:
    """The smallest tiles of wide float32 operands, with their tangents, do not fit on every device."""
    if dtype != torch.float32 or width <= 128 or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    available = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if available >= SHARED_MEMORY_OF_WIDE_FLOAT32:
        return None
    return (
        f"it supports float32 widths above 128 on devices with {SHARED_MEMORY_OF_WIDE_FLOAT32} bytes of "
        f"shared memory, not {available}"
    )
