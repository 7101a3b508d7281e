"""Which entries of an attention layer's projections belong to which head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

BLOCKS = "QKVO"
"""Query, key, value and output projection, in the order of results."""


@dataclass(frozen=True, eq=False)
class Projection:
    """One block of one attention layer: a linear map y = x W^T + b, or the part of it that is the block.

    A head owns features of one side of the map. In Q, K and V these are outputs: the head's slice is their
    rows of W and their entries of b. In O they are inputs: the slice is their columns of W. O's bias is added
    once for all heads and belongs to none, so it is in no slice and in no score.

    Attributes:
        module: dotted name of the linear map in the model.
        side: "output" for Q, K and V, "input" for O.
        transposed: whether the weight is stored (inputs, outputs), as in GPT-2, instead of (outputs, inputs).
        features: what each head owns.
    """

    module: str
    side: Literal["output", "input"]
    transposed: bool
    features: Int64[Tensor, "heads head_dim"]

    @property
    def heads(self) -> int:
        """Number of distinct heads: key-value heads in K and V."""
        return self.features.shape[0]

    def rows(self, weight: Float[Tensor, "a b"]) -> Float[Tensor, "features other"]:
        """A tensor of the weight's shape with the side that heads own in front; a view."""
        return weight if (self.side == "output") != self.transposed else weight.mT

    def weight_by_head(self, weight: Float[Tensor, "a b"]) -> Float[Tensor, "heads head_dim other"]:
        """Every head's slice of a tensor of the weight's shape."""
        return self.rows(weight)[self.features.to(weight.device)]

    def bias_by_head(self, bias: Float[Tensor, " outputs"]) -> Float[Tensor, "heads head_dim"] | None:
        """Every head's slice of a tensor of the bias's shape; None in O, whose bias all heads share."""
        return bias[self.features.to(bias.device)] if self.side == "output" else None


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer.

    Attributes:
        name: of its module.
        projections: by block; a layer without output projection has no "O".
        heads: query heads, each served by key-value head ``head * kv_heads // heads``.
    """

    name: str
    projections: Mapping[str, Projection]
    heads: int


def separate_features(heads: int, head_dim: int) -> Int64[Tensor, "{heads} {head_dim}"]:
    """Features of a projection whose heads stand one after the other."""
    return torch.arange(heads * head_dim).view(heads, head_dim)


def fused_features(
    order: str, heads: int, kv_heads: int, head_dim: int
) -> dict[str, Int64[Tensor, "_ {head_dim}"]]:
    """Output features of a fused query-key-value projection, by block.

    Args:
        order: "contiguous" for all queries, then all keys, then all values; "interleaved" for each key-value
            head its queries, its key and its value (with one query a key-value head: per-head q, k, v).
        heads, kv_heads: query heads, and key-value heads, which divide them.
        head_dim: features of a head.

    Raises:
        ValueError: for another order.
    """
    unit = separate_features(heads + 2 * kv_heads, head_dim)
    if order == "contiguous":
        query, key, value = unit.split((heads, kv_heads, kv_heads))
    elif order == "interleaved":
        group = heads // kv_heads
        query, key, value = unit.view(kv_heads, group + 2, head_dim).split((group, 1, 1), dim=1)
    else:
        raise ValueError(f"order must be contiguous or interleaved, received {order!r}")
    return {b: f.reshape(-1, head_dim) for b, f in zip("QKV", (query, key, value), strict=True)}
