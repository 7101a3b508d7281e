"""A sequence as chunks, and what of a shard crosses the edges of a chunk."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from theria.memory.shards import same_shard


class Reach(NamedTuple):
    """Which tokens of a chunk share a shard with one another and with the chunk's two ends.

    ``visible[i, j]``: token i sees token j, of its shard and not after it. ``reads[i]``: token i is of the
    shard that the state before the chunk belongs to. ``writes[i]``: token i is of the shard that the state
    after it belongs to. ``ends``: the ranks of the states before the first chunk and after every chunk.
    The last three are None where all tokens are of one shard.
    """

    visible: Bool[Tensor, "*_ chunk chunk"]
    reads: Bool[Tensor, "batch 1 chunks chunk"] | None = None
    writes: Bool[Tensor, "batch 1 chunks chunk"] | None = None
    ends: Int64[Tensor, "batch 1 states"] | None = None


def reach_of(
    ranks: Int64[Tensor, "batch 1 chunks chunk"] | None,
    before: Int64[Tensor, "batch 1"] | None,
    chunk: int,
    device: torch.device,
) -> Reach:
    """The reach of tokens of the given ranks, the state before them being of rank ``before``, or 0."""
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    if ranks is None:
        return Reach(causal)
    if before is None:
        before = ranks.new_zeros(ranks.shape[:2])
    ends = torch.cat((before.unsqueeze(-1), ranks[..., -1]), dim=-1)
    return Reach(
        same_shard(ranks, ranks) & causal,
        reads=ranks == ends[..., :-1, None],
        writes=ranks == ends[..., 1:, None],
        ends=ends,
    )


def survival(reach: Reach, chunks: int, device: torch.device) -> Bool[Tensor, "*_ states states"]:
    """[n, m] is True where what the m-th state holds, or the m-th chunk wrote, is still in the n-th state.

    State 0 is the initial one, state n that after the n-th chunk.
    """
    causal = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=device).tril()
    return causal if reach.ends is None else same_shard(reach.ends, reach.ends) & causal


def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """(batch, heads, length, ...) as (batch, heads, chunks, chunk, ...), the last chunk filled with zeros."""
    missing = -tensor.shape[2] % chunk
    if missing:
        filler = tensor.new_zeros(*tensor.shape[:2], missing, *tensor.shape[3:])
        tensor = torch.cat((tensor, filler), dim=2)
    return tensor.unflatten(2, (-1, chunk))


def ranks_in_chunks(
    ranks: Int64[Tensor, "batch length"], chunk: int
) -> Int64[Tensor, "batch 1 chunks {chunk}"]:
    """Ranks of the tokens, those that fill the last chunk being of the last shard."""
    missing = -ranks.shape[1] % chunk
    if missing:
        ranks = torch.cat((ranks, ranks[:, -1:].expand(-1, missing)), dim=1)
    return ranks.unflatten(1, (-1, chunk)).unsqueeze(1)


def groups_of(tensor: Tensor | None, size: int, count: int) -> Iterator[Tensor | None]:
    """The chunks (dimension 2), ``size`` at a time; ``count`` times None for None."""
    return iter([None] * count) if tensor is None else iter(tensor.split(size, dim=2))
