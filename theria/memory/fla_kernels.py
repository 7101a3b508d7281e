"""The accumulators by flash-linear-attention's chunk kernels, an optional package (``theria[fla]``).

What those kernels leave out is added here or refused by name. Shards are not given to them as a list of
lengths, which would be read back from the device: a decay of exp(-128), zero in their float32 state and
scores, stands at each shard's first token, so the cut is exact. There is no second derivative: asking for one
raises. Facts about the package are those of its version 0.6.0.
"""

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd import Function

from theria.memory.shards import begins_of

Rule = Literal["hebbian", "delta", "gated_delta"]

MAX_KEY_DIM = 256
CHUNK_SIZES = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16)

# github.com/fla-org/flash-linear-attention/issues/640; the package itself raises then, in the backward
WRONG_SINCE, WRONG_UNTIL = (3, 4), (3, 7, 1)

# exp(-128) is below half of float32's least number. A power of two, and not larger than needed: the kernels
# add up a chunk's log decays in float32, where it must not swallow those of the gate.
_RESET = -128.0


def refusal(dtype: torch.dtype, device: torch.device, key_dim: int, chunk_size: int) -> str | None:
    """Why the kernels cannot do a call, as "they support ..., not ...", or None where they can."""
    if device.type != "cuda":
        return f"they run on CUDA devices, not on {device}"
    if dtype not in DTYPES:
        return f"they compute {' and '.join(map(str, DTYPES))} (autocast included), not {dtype}"
    if key_dim > MAX_KEY_DIM:
        return f"they support keys up to {MAX_KEY_DIM} wide, not {key_dim}"
    if chunk_size not in CHUNK_SIZES:
        return f"they support the chunk sizes {', '.join(map(str, CHUNK_SIZES))}, not {chunk_size}"
    if not _installed():
        return "flash-linear-attention is not installed; pip install 'theria[fla]'"
    if _is_hopper(device) and WRONG_SINCE <= _triton_version() < WRONG_UNTIL:
        return (
            "their gradient with decays, of which shards are made too, comes out wrong on Hopper GPUs by "
            f"Triton {_text(WRONG_SINCE)} up to {_text(WRONG_UNTIL)}, not included; here it is "
            f"{_text(_triton_version())}"
        )
    return None


def fla_read(
    rule: Rule,
    query: Float[Tensor, "batch heads length key_dim"],
    key: Float[Tensor, "batch heads length key_dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    beta: Float[Tensor, "batch heads length"] | None,
    log_decay: Float[Tensor, "batch heads length"] | None,
    ranks: Int64[Tensor, "batch length"] | None,
    initial: Float[Tensor, "batch heads key_dim value_dim"],
    chunk_size: int,
) -> tuple[Float[Tensor, "batch heads length value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """``hebbian_read`` (beta and log_decay None) or ``delta_read``: half precision, a float32 state."""
    decay = _with_resets(log_decay, ranks, query)
    arguments: dict[str, Any] = {
        "q": query.transpose(1, 2),
        "k": key.transpose(1, 2),
        "v": value.transpose(1, 2),
        "scale": 1.0,
        "initial_state": initial,
        "output_final_state": True,
        "chunk_size": chunk_size,
    }
    if beta is not None:
        arguments["beta"] = beta.transpose(1, 2)
    if decay is not None:
        arguments["g"] = decay.transpose(1, 2)
    read, final = _kernel(rule, gated=decay is not None)(**arguments)
    return _FirstOrderOnly.apply(read.transpose(1, 2)), _FirstOrderOnly.apply(final)


class _FirstOrderOnly(Function):
    """The identity, whose gradient refuses to be differentiated.

    The kernels' own backward returns gradients without a graph: under ``create_graph=True`` a second
    derivative would come out wrong without a word.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "flash-linear-attention's kernels have no second derivative; use kernel='tensor' with "
                "create_graph=True"
            )
        return cotangent


def _with_resets(log_decay: Tensor | None, ranks: Tensor | None, query: Tensor) -> Tensor | None:
    """Log decays (batch, heads, length) in float32 that clear the state at a shard's first token."""
    if ranks is None:
        return log_decay
    batch, heads, length, _ = query.shape
    if log_decay is None:
        log_decay = torch.zeros(batch, heads, length, device=query.device)
    return log_decay.masked_fill(begins_of(ranks).unsqueeze(1), _RESET)


def _kernel(rule: Rule, *, gated: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The package's function for a rule; a delta rule with decays, of a gate or of shards, is a gated one."""
    if rule == "hebbian":
        module, name = "fla.ops.simple_gla", "chunk_simple_gla"
    elif gated:
        module, name = "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"
    else:
        module, name = "fla.ops.delta_rule", "chunk_delta_rule"
    return getattr(importlib.import_module(module), name)


@cache
def _installed() -> bool:
    return find_spec("fla") is not None


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def _triton_version() -> tuple[int, ...]:
    version = importlib.import_module("triton").__version__
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
