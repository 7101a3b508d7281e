"""G2-8: no gradient crosses a shard boundary, and within a shard it reaches beyond attention."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.training_gates.gate import Gate
from theria.models.memory_lm import MemoryLM, MemoryLMOutput


class BoundaryGradients(NamedTuple):
    """Largest absolute entries of gradients on embedded tokens.

    Attributes:
        across: of all that follows a boundary (logits, and the memories' states) on tokens before it.
        within: of the last logits on tokens of their shard that attention does not reach.
        distance: tokens between these and the last one, at least.
    """

    across: float
    within: float
    distance: int


def measure_boundary(
    model: MemoryLM, tokens: Tensor, *, reach: int, precision: Callable[[], AbstractContextManager[Any]]
) -> BoundaryGradients:
    """Gradients of the model on tokens (batch, length) in two shards.

    Args:
        model: any, on the device of the tokens.
        tokens: the boundary is behind an eighth of them.
        reach: tokens that attention alone reaches back.
        precision: makes the context in which training computes.

    Raises:
        ValueError: the second shard is not longer than the reach.
    """
    length = tokens.shape[1]
    boundary = max(1, length // 8)
    beyond = length - 1 - reach
    if beyond <= boundary:
        raise ValueError(
            f"a shard of {length - boundary} tokens must be longer than attention's reach of {reach}"
        )
    segment_ids = (torch.arange(length, device=tokens.device) >= boundary).long().expand_as(tokens)
    embedded: list[Tensor] = []

    def cut(module: Any, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.embedding.register_forward_hook(cut)
    try:
        with precision():
            output: MemoryLMOutput = model(tokens, segment_ids=segment_ids)
    finally:
        hook.remove()
    after = [output.logits[:, boundary:]]
    for block in output.state.blocks:
        if block.memory is not None:
            after += [
                block.memory.projection.memory,
                block.memory.projection.norm_sum,
                block.memory.memory.memory,
            ]
    (across,) = torch.autograd.grad(_random_sum(after), embedded, retain_graph=True)
    (within,) = torch.autograd.grad(_random_sum([output.logits[:, -1]]), embedded)
    return BoundaryGradients(
        across=float(across[:, :boundary].abs().max()),
        within=float(within[:, boundary:beyond].abs().max()),
        distance=reach + 1,
    )


def boundary_gate(found: BoundaryGradients) -> Gate:
    """Whether one is exactly zero and the other is not."""
    return Gate(
        "G2-8",
        f"largest entry of a gradient {found.across:g} across a boundary, {found.within:.1e} within a shard "
        f"from at least {found.distance} tokens back",
        "exactly 0 across, above 0 within a shard beyond attention's reach",
        found.across == 0 and 0 < found.within < float("inf"),
    )


def _random_sum(parts: list[Tensor]) -> Tensor:
    """A sum with random weights, in which no gradient cancels another."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [
            (part.float() * torch.randn(part.shape, generator=generator).to(part.device)).sum()
            for part in parts
        ]
    ).sum()
