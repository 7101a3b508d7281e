"""One causal accumulator under three write rules, computed by tensor operations or by fla's kernels."""

from contextlib import nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from theria.attention.call import autocasts
from theria.memory.delta import delta_read
from theria.memory.fla_kernels import Rule, fla_read, refusal
from theria.memory.hebbian import hebbian_read

KERNELS = ("auto", "tensor", "fla")
RULES: tuple[Rule, ...] = get_args(Rule)


def resolve_kernel(
    query: Tensor, key: Tensor, *, chunk_size: int = 64, kernel: str = "auto"
) -> Literal["tensor", "fla"]:
    """The kernel that a call takes: a pure function of the inputs' attributes, autocast and the installation.

    "auto" takes flash-linear-attention's chunk kernels where they compute the call (CUDA, half precision or
    autocast to it, keys up to 256 wide, chunks of 16, 32 or 64, the package installed) and the sequence
    fills at least one chunk; else tensor operations. float32 is left to tensor operations: the kernels
    round its products to TF32, or refuse it.

    Raises:
        ValueError: for another name, or a chunk size that is not a positive integer.
        NotImplementedError: if "fla" is named and cannot do the call; it says why.
    """
    check_kernel(kernel, chunk_size)
    if kernel == "tensor" or (kernel == "auto" and query.shape[-2] < chunk_size):
        return "tensor"
    reason = refusal(_autocast_dtype(query), query.device, key.shape[-1], chunk_size)
    if reason is None:
        return "fla"
    if kernel == "fla":
        raise NotImplementedError(f"the kernels of flash-linear-attention cannot do this call: {reason}")
    return "tensor"


def check_kernel(kernel: str, chunk_size: int) -> None:
    """Raise ValueError for a kernel that is none, or a chunk size that is not a positive integer."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, received {kernel!r}")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, received {chunk_size!r}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums over tokens of this dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that sums over it are taken in."""
    return tensor.to(state_dtype(tensor.dtype))


# not traced by a compiler: its loop over chunks would be unrolled, or its kernels are opaque
@torch.compiler.disable
def causal_read(
    rule: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    beta: Tensor | None,
    log_decay: Tensor | None,
    ranks: Tensor | None,
    initial: Tensor,
    chunk_size: int,
    kernel: str,
    constant: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads o_t = (S_t + C)^T q_t (batch, heads, length, value_dim), and the state S after the last token.

    Tensor operations compute in the state's dtype, whatever autocast says; fla's kernels take half
    precision and keep a float32 state. Arguments as for ``theria.memory.delta.delta_read``, and checked by
    the caller. For the Hebbian rule beta is the strength of a write, and there is no decay. C is ``constant``
    (heads, key_dim, value_dim), which no shard resets; None for 0.

    Returns:
        The reads in the state's dtype, and the state (batch, heads, key_dim, value_dim) in float32, or in
        float64 for float64.
    """
    name = resolve_kernel(query, key, chunk_size=chunk_size, kernel=kernel)
    dtype = _autocast_dtype(query) if name == "fla" else state_dtype(query.dtype)
    with without_autocast(query):
        query, key, value = (t.to(dtype) for t in (query, key, value))
        if rule == "hebbian":
            value = value if beta is None else (value * beta.unsqueeze(-1)).to(dtype)
            beta = None
        elif beta is None:
            beta = query.new_ones(query.shape[:-1], dtype=initial.dtype)
        else:
            beta = beta.to(initial.dtype)
        if log_decay is not None:
            log_decay = log_decay.to(initial.dtype)
        if name == "fla":
            read, final = fla_read(rule, query, key, value, beta, log_decay, ranks, initial, chunk_size)
            read = read.to(initial.dtype)
        elif beta is None:
            read, final = hebbian_read(query, key, value, ranks, initial, chunk_size)
        else:
            read, final = delta_read(query, key, value, beta, log_decay, ranks, initial, chunk_size)
        if constant is not None:
            read = read + query @ constant.to(dtype)
        return read, final


def without_autocast(tensor: Tensor) -> torch.autocast | nullcontext[None]:
    """A context in which products on the tensor's device keep the dtype of their factors."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    if autocasts(tensor.device.type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype
