"""Sliding-window self-attention: rotary positions, a bounded cache, and shards that do not see each other."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from theria.attention import check_backend_name, scaled_dot_product_attention
from theria.memory.shards import ranks_of

_FOREIGN = 1024.0
"""How far a score is lowered for a key of another shard: its exponential is zero in float64 too."""


class AttentionState(NamedTuple):
    """The last ``window - 1`` tokens (fewer at the start of a sequence), as a later call sees them.

    Attributes:
        key, value: rotated keys, and values.
        segment_ids: of these tokens; None (as 0) where none were given yet.
    """

    key: Float[Tensor, "batch heads cached head_dim"]
    value: Float[Tensor, "batch heads cached head_dim"]
    segment_ids: Int64[Tensor, "batch cached"] | None = None


class WindowAttention(nn.Module):
    """Causal self-attention over a window, heads left apart for whoever mixes them.

    A token sees itself and the ``window - 1`` tokens before it that are of its shard. Shards are kept apart
    by features appended to queries and keys: the bits of a shard's rank, arranged so that their product is
    exactly 0 within a shard and -1024 or less across. The visible scores therefore keep every bit and an
    invisible key's probability is exactly 0, on any backend. It costs 2 log2(window) more columns, and only
    where segment ids are given.

    Args:
        width: of the tokens.
        heads: attention heads of width / heads each, an even number.
        window: tokens a token sees, itself included.
        backend: of ``theria.attention.scaled_dot_product_attention``.

    Raises:
        ValueError: for sizes that do not fit, or an unknown backend.
        NotImplementedError: for a backend that is not available in this build.
    """

    def __init__(self, width: int, heads: int, *, window: int, backend: str = "auto") -> None:
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise ValueError(f"width must be an even number a head, received width {width}, heads {heads}")
        if window < 2:
            raise ValueError(f"window must be at least 2, received {window}")
        check_backend_name(backend)
        self.heads = heads
        self.head_dim = width // heads
        self.window = window
        self.backend = backend
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        rotation: Float[Tensor, "2 length half"],
        *,
        segment_ids: Int64[Tensor, "batch length"] | None = None,
        state: AttentionState | None = None,
    ) -> tuple[Float[Tensor, "batch length heads head_dim"], AttentionState]:
        """What every head of every token reads, and the state after the last token.

        Args:
            x: the tokens.
            rotation: of their positions, see ``rotation_of``.
            segment_ids: as for ``theria.memory.causal_projection``.
            state: of the call that ended where this one begins.
        """
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        length, ids = x.shape[1], segment_ids
        if state is not None:
            ids = _continued(segment_ids, state, length)
            k, v = torch.cat((state.key, k), dim=2), torch.cat((state.value, v), dim=2)
        seen = k
        if ids is not None:
            q, seen = self._apart(q, k, ids)
        read = self._attend(q, seen, v)
        return read.transpose(1, 2), self._cached(k, v, ids)

    # a compiler traces neither the kernels' autograd functions nor gains anything inside them
    @torch.compiler.disable
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            q,
            k,
            v,
            window=self.window,
            causal_alignment="lower_right",
            scale=self.head_dim**-0.5,
            backend=self.backend,
        )

    # views, which would be made anew from what a compiled part returns
    @torch.compiler.disable
    def _cached(self, k: Tensor, v: Tensor, ids: Tensor | None) -> AttentionState:
        last = slice(max(0, k.shape[2] - self.window + 1), None)
        return AttentionState(k[:, :, last], v[:, :, last], None if ids is None else ids[:, last])

    def _apart(self, q: Tensor, k: Tensor, ids: Int64[Tensor, "batch keys"]) -> tuple[Tensor, Tensor]:
        """Queries and keys with the features that lower their product where their shards differ."""
        ranks = ranks_of(ids, ids[:, 0])
        # the keys that a query sees are of ranks that differ by less than the window
        places = torch.arange((self.window - 1).bit_length(), device=ids.device)
        bits = ((ranks.unsqueeze(-1) >> places) & 1).to(q.dtype).unsqueeze(1)
        # a power of two, so that half precision holds it
        depth = 2.0 ** math.ceil(math.log2(_FOREIGN * self.head_dim**0.5))
        for_query = torch.cat((bits, 1 - bits), dim=-1)[:, :, -q.shape[2] :]
        for_key = torch.cat((1 - bits, bits), dim=-1) * -depth
        return (
            torch.cat((q, for_query.expand(-1, self.heads, -1, -1)), dim=-1),
            torch.cat((k, for_key.expand(-1, self.heads, -1, -1)), dim=-1),
        )


def rotation_of(
    first: int,
    length: int,
    head_dim: int,
    *,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "2 {length} half"]:
    """Cosines and sines of the positions first .. first + length - 1, by which ``rotate`` turns a head.

    The angles base^(-2 i / head_dim) position are taken in float64: in float32 they lose whole
    degrees at positions beyond 10^5. Su et al., "RoFormer", 2021 (arXiv 2104.09864).
    """
    position = torch.arange(first, first + length, dtype=torch.float64, device=device)
    frequency = base ** -torch.arange(0, 1, 2 / head_dim, dtype=torch.float64, device=device)
    angle = position.unsqueeze(1) * frequency
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


def rotate(
    heads: Float[Tensor, "*batch length head_dim"], rotation: Float[Tensor, "2 length half"]
) -> Float[Tensor, "*batch length head_dim"]:
    """Turn feature i and feature i + head_dim / 2 of every token by the angles of its position."""
    cosine, sine = rotation
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1).to(heads.dtype)


def _continued(segment_ids: Tensor | None, state: AttentionState, length: int) -> Tensor | None:
    """Ids of cached and new tokens: those not given are the last known, or 0."""
    before = state.segment_ids
    if before is None:
        if segment_ids is None:
            return None
        before = segment_ids.new_zeros(segment_ids.shape[0], state.key.shape[2])
    elif segment_ids is None:
        segment_ids = before[:, -1:].expand(-1, length)
    return torch.cat((before, segment_ids), dim=1)
