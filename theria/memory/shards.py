"""Where shards begin in a packed batch, and which tokens share one."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


class Shards(NamedTuple):
    """The shards of one call.

    Attributes:
        ranks: how many shards have begun since the call's initial state, for every token; 0 is the shard
            that the initial state belongs to. None where no shard begins.
        last: the segment id of the last token, None where none was ever given.
    """

    ranks: Int64[Tensor, "batch length"] | None
    last: Int64[Tensor, " batch"] | None


def shards_of(segment_ids: Tensor | None, previous: Tensor | None, batch: int, length: int) -> Shards:
    """Rank the shards of ``segment_ids`` (batch, length), the first of which may continue ``previous``.

    A token whose id differs from the token's before it begins a shard; the token before the first has the
    id ``previous`` (batch,), or 0. Without ids every token continues the shard before it. Nothing is read
    back from the device.

    Raises:
        ValueError: for ids that are not int64 of shape (batch, length).
    """
    if segment_ids is None:
        return Shards(None, previous)
    if segment_ids.shape != (batch, length) or segment_ids.dtype != torch.int64:
        raise ValueError(
            f"segment_ids must be int64 of shape (batch, length) = {(batch, length)}, "
            f"received {segment_ids.dtype} of {tuple(segment_ids.shape)}"
        )
    if previous is None:
        previous = segment_ids.new_zeros(batch)
    # a copy: a view would keep the whole batch's ids alive in a state
    return Shards(ranks_of(segment_ids, previous), segment_ids[:, -1].clone() if length else previous)


def ranks_of(
    segment_ids: Int64[Tensor, "batch length"], previous: Int64[Tensor, " batch"]
) -> Int64[Tensor, "batch length"]:
    """How often the id has changed up to each token, since the token before the first, of id ``previous``."""
    ids = torch.cat((previous.unsqueeze(1), segment_ids), dim=1)
    return (ids[:, 1:] != ids[:, :-1]).cumsum(dim=1)


def same_shard(
    ranks: Int64[Tensor, "*leading queries"], others: Int64[Tensor, "*leading keys"]
) -> Bool[Tensor, "*leading queries keys"]:
    """True where two tokens are of one shard."""
    return ranks.unsqueeze(-1) == others.unsqueeze(-2)


def begins_of(ranks: Int64[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
    """True at the first token of every shard that begins in the call."""
    return ranks != torch.cat((ranks.new_zeros(ranks.shape[0], 1), ranks[:, :-1]), dim=1)
