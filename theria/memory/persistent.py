"""Memory that every shard starts from."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theria.memory.accumulator import widened, without_autocast


class PersistentMemory(nn.Module):
    r"""Learned vectors P whose second moment is in a memory before its first token.

    .. math:: M_{persistent} = P_h^T P_h, \qquad norm_{persistent} = \sum_p |P_{ph}|^2

    for every head h. Both are computed from P each time they are asked for, so P receives their gradients
    and a checkpoint that restores P restores both.

    Args:
        heads: memory heads.
        dim: width of a head.
        slots: vectors a head, 64 by default.

    Attributes:
        vectors: P, (slots, heads, dim), 0.02 N(0, 1) at the start.

    Raises:
        ValueError: for a size that is not a positive integer.
    """

    def __init__(self, heads: int, dim: int, *, slots: int = 64) -> None:
        super().__init__()
        for name, size in (("heads", heads), ("dim", dim), ("slots", slots)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a positive integer, received {size!r}")
        self.vectors = nn.Parameter(0.02 * torch.randn(slots, heads, dim))

    @property
    def m_persistent(self) -> Float[Tensor, "heads dim dim"]:
        """P_h^T P_h in float32, or float64 for float64 vectors, whatever autocast says."""
        with without_autocast(self.vectors):
            vectors = widened(self.vectors).transpose(0, 1)
            return vectors.mT @ vectors

    @property
    def norm_persistent(self) -> Float[Tensor, " heads"]:
        """The sum over the vectors of |p|^2, the trace of ``m_persistent``."""
        return widened(self.vectors).square().sum(dim=(0, 2))
