"""The Hebbian accumulator in chunks: linear attention without a normaliser, reset where a shard begins."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from theria.memory.chunks import groups_of, in_chunks, ranks_in_chunks, reach_of, survival
from theria.memory.shards import same_shard

CHUNKS_AT_ONCE = 16
"""Chunks whose states are summed by one product; what is summed grows with it, Python's loop shrinks."""
SUMMED_AT_ONCE = 64
"""Tokens whose running sums are one masked sum."""


def hebbian_read(
    query: Float[Tensor, "batch heads length key_dim"],
    key: Float[Tensor, "batch heads length key_dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    ranks: Int64[Tensor, "batch length"] | None,
    initial: Float[Tensor, "batch heads key_dim value_dim"],
    chunk_size: int,
) -> tuple[Float[Tensor, "batch heads length value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    r"""o_t = S_t^T q_t with S_t = S_{t-1} + k_t v_t^T, and S before a shard's first token zero.

    A chunk's tokens see one another through masked scores, and what came before through the chunk's state:

    .. math::
        O = (Q K^T \circ \text{mask}) V + Q S_n, \qquad S_n = S_0 + \sum_{m<n} K_m^T V_m

    The sums over chunks are one product with a matrix of zeros and ones, which also says where a shard
    boundary lies between; so what a shard does not see has weight zero, in every derivative.

    Args:
        query, key, value: in the dtype that is computed in.
        ranks: shard of every token, ``theria.memory.shards.Shards.ranks``.
        initial: the state that tokens of rank 0 continue.
        chunk_size: tokens a chunk; every size gives the same numbers up to rounding.

    Returns:
        The reads, and the state after the last token.
    """
    length = query.shape[2]
    if length == 0:
        return value, initial
    chunk = min(chunk_size, length)
    q, k, v = (in_chunks(t, chunk) for t in (query, key, value))
    groups = -(-q.shape[2] // CHUNKS_AT_ONCE)
    ranked = None if ranks is None else ranks_in_chunks(ranks, chunk)
    parts = [groups_of(t, CHUNKS_AT_ONCE, groups) for t in (q, k, v, ranked)]
    state, before, reads = initial, None, []
    for q_group, k_group, v_group, rank_group in zip(*parts, strict=True):
        read, state = _read_group(q_group, k_group, v_group, rank_group, state, before)
        reads.append(read)
        before = None if rank_group is None else rank_group[..., -1, -1]
    return torch.cat(reads, dim=2).flatten(2, 3)[:, :, :length], state


def running_sum(
    amount: Float[Tensor, "batch heads length"],
    ranks: Int64[Tensor, "batch length"] | None,
    initial: Float[Tensor, "batch heads"],
) -> tuple[Float[Tensor, "batch heads length"], Float[Tensor, "batch heads"]]:
    """The sum over a token's shard up to and with the token, begun at ``initial`` where the rank is 0.

    A chunk's sums are taken at once, then those of the chunks in the same way, so time is linear in length.
    (Differences of one sum over all tokens would leave rounding in the derivatives across shards.)
    """
    length = amount.shape[-1]
    if length == 0:
        return amount, initial
    if ranks is None:
        total = initial.unsqueeze(-1) + amount.cumsum(dim=-1)
        return total, total[..., -1]
    whole_chunks = length % min(SUMMED_AT_ONCE, length) == 0
    return (_sum_of_shards if whole_chunks else _untraced_sum_of_shards)(amount, ranks, initial)


def _sum_of_shards(
    amount: Float[Tensor, "batch heads length"],
    ranks: Int64[Tensor, "batch length"],
    initial: Float[Tensor, "batch heads"],
) -> tuple[Float[Tensor, "batch heads length"], Float[Tensor, "batch heads"]]:
    length = amount.shape[-1]
    chunk = min(SUMMED_AT_ONCE, length)
    amounts, ranked = in_chunks(amount, chunk), ranks_in_chunks(ranks, chunk)
    ends = ranked[..., -1]
    visible = same_shard(ranked, ranked).tril()
    inside = amounts.unsqueeze(-2).masked_fill(~visible, 0).sum(dim=-1)
    before = initial.unsqueeze(-1)
    if length > chunk:
        after, _ = running_sum(inside[..., -1], ends[:, 0], initial)
        before = torch.cat((before, after[..., :-1]), dim=-1)
    first = torch.zeros_like(ends[..., :1])
    goes_on = ranked == torch.cat((first, ends[..., :-1]), dim=-1).unsqueeze(-1)
    total = (inside + before.unsqueeze(-1).masked_fill(~goes_on, 0)).flatten(2)
    return total[..., :length], total[..., -1]


# inductor (torch 2.13, on a CPU) reads memory that nobody wrote where a filled-up chunk is cut again
_untraced_sum_of_shards = torch.compiler.disable(_sum_of_shards)


def _read_group(
    query: Float[Tensor, "batch heads chunks chunk key_dim"],
    key: Float[Tensor, "batch heads chunks chunk key_dim"],
    value: Float[Tensor, "batch heads chunks chunk value_dim"],
    ranks: Int64[Tensor, "batch 1 chunks chunk"] | None,
    state: Float[Tensor, "batch heads key_dim value_dim"],
    before: Int64[Tensor, "batch 1"] | None,
) -> tuple[
    Float[Tensor, "batch heads chunks chunk value_dim"], Float[Tensor, "batch heads key_dim value_dim"]
]:
    chunks, chunk = query.shape[2:4]
    reach = reach_of(ranks, before, chunk, query.device)
    scores = (query @ key.mT).masked_fill(~reach.visible, 0)
    if reach.reads is not None and reach.writes is not None:
        query = query.masked_fill(~reach.reads.unsqueeze(-1), 0)
        key = key.masked_fill(~reach.writes.unsqueeze(-1), 0)
    written = torch.cat((state.unsqueeze(2), key.mT @ value), dim=2).flatten(-2)
    weights = survival(reach, chunks, query.device).to(query.dtype)
    states = (weights @ written).unflatten(-1, state.shape[-2:])
    return scores @ value + query @ states[:, :, :-1], states[:, :, -1]
