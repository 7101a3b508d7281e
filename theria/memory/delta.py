"""The delta rule in chunks: what a key would read back is corrected towards its value, no token in a loop.

Yang, Wang, Zhang, Shen and Kim, "Parallelizing linear transformers with the delta rule over sequence length",
2024 (arXiv 2406.06484), section 3.2; gated: Yang, Kautz and Hatamizadeh, "Gated delta networks", 2024 (arXiv
2412.06464), section 3.3.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from theria.memory.chunks import Reach, in_chunks, ranks_in_chunks, reach_of
from theria.memory.shards import begins_of


def delta_read(
    query: Float[Tensor, "batch heads length key_dim"],
    key: Float[Tensor, "batch heads length key_dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    beta: Float[Tensor, "batch heads length"],
    log_decay: Float[Tensor, "batch heads length"] | None,
    ranks: Int64[Tensor, "batch length"] | None,
    initial: Float[Tensor, "batch heads key_dim value_dim"],
    chunk_size: int,
) -> tuple[Float[Tensor, "batch heads length value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    r"""o_t = S_t^T q_t with S_t = (I - beta_t k_t k_t^T) alpha_t S_{t-1} + beta_t k_t v_t^T.

    Every token adds k_t u_t^T, so that within a chunk u solves a unit lower triangular system,

    .. math::
        u_t = \beta_t (v_t - \gamma_t S_n^T k_t)
              - \beta_t \sum_{j<t} \frac{\gamma_t}{\gamma_j} (k_t \cdot k_j) u_j

    with gamma the decay since the chunk began. The system is solved for all chunks at once, for the part
    that the chunk's state S_n leaves alone and for the factor of S_n. What remains is a recurrence over
    chunks whose every step is two matrix products. Its factors are matrices, so it is a loop.

    Args:
        query, key, value, ranks, initial, chunk_size: as for ``theria.memory.hebbian.hebbian_read``.
        beta: strength of the write, 1 for what a key reads back right after to be its value (unit keys).
        log_decay: log alpha_t, at most 0; None for alpha = 1.
    """
    length, value_dim = value.shape[2:]
    if length == 0:
        return value, initial
    chunk = min(chunk_size, length)
    q, k, v, b = (in_chunks(t, chunk) for t in (query, key, value, beta))
    ranked = None if ranks is None else ranks_in_chunks(ranks, chunk)
    reach = reach_of(ranked, None, chunk, query.device)
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    elif ranks is not None:
        # before a shard's first token there is nothing to forget
        log_decay = log_decay.masked_fill(begins_of(ranks).unsqueeze(1), 0)
    decay = in_chunks(log_decay, chunk)
    pairs, from_start, to_end, whole = _decays(decay, reach)

    written = k * b.unsqueeze(-1)
    system = (written @ k.mT) * pairs
    known = torch.cat((v * b.unsqueeze(-1), written * from_start.unsqueeze(-1)), dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    own, through_state = solved.split((value_dim, solved.shape[-1] - value_dim), dim=-1)

    # unbind and stack: indexing in the loop would fill a whole tensor of zeros per chunk in the backward
    seen = torch.cat((through_state, q * from_start.unsqueeze(-1)), dim=-2).unbind(2)
    kept = (k * to_end.unsqueeze(-1)).mT.unbind(2)
    state, updates, reads = initial, [], []
    for own_n, seen_n, kept_n, whole_n in zip(own.unbind(2), seen, kept, whole.unbind(2), strict=True):
        corrected, read = (seen_n @ state).chunk(2, dim=-2)
        update = own_n - corrected
        state = whole_n[..., None, None] * state + kept_n @ update
        updates.append(update)
        reads.append(read)
    out = ((q @ k.mT) * pairs) @ torch.stack(updates, dim=2) + torch.stack(reads, dim=2)
    return out.flatten(2, 3)[:, :, :length], state


def _decays(
    log_decay: Float[Tensor, "batch heads chunks chunk"], reach: Reach
) -> tuple[
    Float[Tensor, "batch heads chunks chunk chunk"],
    Float[Tensor, "batch heads chunks chunk"],
    Float[Tensor, "batch heads chunks chunk"],
    Float[Tensor, "batch heads chunks"],
]:
    """Decay between two tokens, from a chunk's start, to its end, and over all of it; 0 across shards."""
    # of the token's own shard alone: a difference of sums over more would leave rounding in the derivatives
    since = log_decay.cumsum(dim=-1) if reach.ends is None else _shard_sums(log_decay, reach)
    pairs = since.unsqueeze(-1) - since.unsqueeze(-2)
    # masked before the exponential, which could overflow where a token does not see another
    pairs = pairs.masked_fill(~reach.visible, -math.inf).exp()
    to_end = since[..., -1:] - since
    whole = since[..., -1]
    if reach.reads is not None and reach.writes is not None and reach.ends is not None:
        since = since.masked_fill(~reach.reads, -math.inf)
        to_end = to_end.masked_fill(~reach.writes, -math.inf)
        whole = whole.masked_fill(reach.ends[..., 1:] != reach.ends[..., :-1], -math.inf)
    return pairs, since.exp(), to_end.exp(), whole.exp()


def _shard_sums(
    log_decay: Float[Tensor, "batch heads chunks chunk"], reach: Reach
) -> Float[Tensor, "batch heads chunks chunk"]:
    return (reach.visible.to(log_decay.dtype) @ log_decay.unsqueeze(-1)).squeeze(-1)
