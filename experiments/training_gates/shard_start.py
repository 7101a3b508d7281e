"""G2-3: a shard starts from the persistent numerator and denominator, in the model that trains."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.training_gates.gate import Gate
from theria.memory import QKProjection
from theria.memory.projection import ProjectionState
from theria.models.memory_lm import MemoryLM

NORM_TOLERANCE = 1e-5
QUERY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Of the projected query, relative, by the dtype of its numbers."""

_LEAST_CONTRAST = 10.0


class ShardStart(NamedTuple):
    """Largest relative differences over layers, heads and starts of shards, from float64.

    Attributes:
        reset: of norm_sum after ``reset_at_shard_boundary`` from the sum of |p|^2.
        running: of norm_sum after a first token k from that and |k|^2, in the forward pass.
        query: of the projected query of first tokens from (M_persistent + k k^T) q over that.
        contrast: the least difference of the same formula without norm_persistent.
        dtype: of the queries.
    """

    reset: float
    running: float
    query: float
    contrast: float
    dtype: torch.dtype


class _Call(NamedTuple):
    projection: QKProjection
    q: Tensor
    k: Tensor
    projected: Tensor
    state: ProjectionState


@torch.no_grad()
def measure_shard_start(
    model: MemoryLM, tokens: Tensor, precision: Callable[[], AbstractContextManager[Any]]
) -> ShardStart:
    """Run the model on tokens (batch, length) in three shards, the last of one token, and look inside."""
    length = tokens.shape[1]
    starts = [0, length // 2, length - 1]
    segment_ids = torch.zeros_like(tokens)
    for start in starts[1:]:
        segment_ids[:, start:] += 1
    calls = _calls(model, tokens, segment_ids, precision)
    found = [_differences(call, starts) for call in calls]
    reset, running, query, contrast = (list(column) for column in zip(*found, strict=True))
    return ShardStart(max(reset), max(running), max(query), min(contrast), calls[0].q.dtype)


def shard_start_gate(found: ShardStart) -> Gate:
    """Whether norm_sum is norm_persistent right after a reset, and the projected query shows it."""
    tolerance = QUERY_TOLERANCE[found.dtype]
    norm = max(found.reset, found.running)
    passed = (
        norm <= NORM_TOLERANCE and found.query <= tolerance and found.contrast >= _LEAST_CONTRAST * tolerance
    )
    return Gate(
        "G2-3",
        f"after a reset norm_sum differs from norm_persistent by {found.reset:.1e}, behind a first key in "
        f"the forward pass by {found.running:.1e} from both; the projected queries of first tokens differ by "
        f"{found.query:.1e} from the formula, which without norm_persistent would by {found.contrast:.1e} or "
        "more",
        f"norm_sum {NORM_TOLERANCE:g}, queries {tolerance:g}, without norm_persistent at least "
        f"{_LEAST_CONTRAST:g} times that (all relative)",
        passed,
    )


def _calls(
    model: MemoryLM, tokens: Tensor, segment_ids: Tensor, precision: Callable[[], AbstractContextManager[Any]]
) -> list[_Call]:
    calls: list[_Call] = []

    def note(module: Any, args: tuple[Tensor, Tensor], output: tuple[Tensor, ProjectionState]) -> None:
        calls.append(_Call(module, *args, *output))

    parts = [part for part in model.modules() if isinstance(part, QKProjection)]
    hooks = [part.register_forward_hook(note) for part in parts]
    try:
        with precision():
            model(tokens, segment_ids=segment_ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise ValueError(f"{type(model).__name__} has projected no query: it has no memory, or it is off")
    return calls


def _differences(call: _Call, starts: list[int]) -> tuple[float, float, float, float]:
    """``reset``, ``running``, ``query`` and ``contrast`` of one layer."""
    # from the vectors themselves, since what the module says about them is what is tested
    vectors = call.projection.persistent.vectors.double()
    memory = torch.einsum("shd,she->hde", vectors, vectors)
    norm = vectors.square().sum(dim=(0, 2))
    reset = call.projection.reset_at_shard_boundary(len(call.q)).norm_sum.double()
    q, k = (part[:, :, starts].double() for part in (call.q, call.k))
    written = k.square().sum(dim=-1)
    numerator = torch.einsum("hde,bhse->bhsd", memory, q) + k * (k * q).sum(dim=-1, keepdim=True)
    scaled = numerator * call.projection.scale.double()[:, None, None]
    exact = scaled / (norm[:, None] + written).unsqueeze(-1)
    without = scaled / written.unsqueeze(-1)
    projected = call.projected[:, :, starts].double()
    return (
        float((reset / norm - 1).abs().max()),
        float((call.state.norm_sum.double() / (written[..., -1] + norm) - 1).abs().max()),
        float(_relative(projected, exact).max()),
        float(_relative(without, exact).min()),
    )


def _relative(found: Tensor, exact: Tensor) -> Tensor:
    return (found - exact).norm(dim=-1) / exact.norm(dim=-1)
