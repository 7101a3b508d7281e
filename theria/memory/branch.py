"""What stands beside attention in a block: a convolution, two accumulators, and what digests the read."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from theria.memory.accumulator import widened
from theria.memory.atlas import AtlasMemory
from theria.memory.persistent import PersistentMemory
from theria.memory.projection import AssociativeMemory, AssociativeState, ProjectionState, QKProjection
from theria.memory.short_conv import ConvState, ShortConvolution

# a gate z of the gated rule forgets by sigmoid(z)^(1/16) a token: at z = 4 half is left after 600 tokens
_DECAY_TEMPERATURE = 16
_DECAY_LOGIT = 4.0
_READ_BOUND = 4.0
_SHARE_LOGIT = -3.0


class MemoryState(NamedTuple):
    """State of a memory branch: of constant size, whatever the length read so far."""

    conv: ConvState
    projection: ProjectionState
    memory: AssociativeState


class MemoryBranch(nn.Module):
    """m = AtlasMemory(W_o r), r read from an associative memory through the projected query.

    With (q, k, v) = conv(W x), q and k of unit length per head, q' = QKProjection(q, k) and
    r_t = S_t ((1 - s) q_t + s q'_t), where s in (0, 1) is learned per head and starts at 0.05. The short
    convolution lets a key name the tokens before its value; it and both accumulators stop at shard
    boundaries.

    Read through q' alone (s = 1) recall in text is not found within a thousand steps: q' is q times the
    keys' second moment, in which the keys of frequent tokens outweigh by an order of magnitude the one key
    that is asked for. A query whose key came often is projected to many times its length (M_t is its keys'
    second moment), so a read's root mean square is bent to stay below 4: r / sqrt(1 + mean(r^2) / 16), which
    is r where reads are of a token's scale, and keeps their dependence on norm_sum.

    It starts out as an induction head: W_k = W_q, a key is that of the token before (and a tenth of its
    own), and W_o is the transpose of W_v, so that a token reads back what followed it earlier, in the
    terms of the residual stream. From a random start the several maps that recall takes find each other
    late, and often not within a thousand steps.

    Args:
        width: of the tokens.
        heads, dim: memory heads and their width, independent of the attention heads.
        rule: of the associative memory; "hebbian", "delta" or "gated_delta".
        slots: persistent vectors a head.
        taps: tokens the convolution sees; 1 for a factor per channel.
        chunk_size, kernel: of the accumulators.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        dim: int,
        rule: str,
        slots: int,
        taps: int,
        chunk_size: int,
        kernel: str,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * heads * dim, bias=False)
        self.conv = ShortConvolution(3 * heads * dim, taps=taps)
        self.projection = QKProjection(
            PersistentMemory(heads, dim, slots=slots), chunk_size=chunk_size, kernel=kernel
        )
        self.memory = AssociativeMemory(rule, chunk_size=chunk_size, kernel=kernel)
        self.share_logit = nn.Parameter(torch.full((heads,), _SHARE_LOGIT))
        self.beta = nn.Linear(width, heads) if rule != "hebbian" else None
        self.decay = nn.Linear(width, heads) if rule == "gated_delta" else None
        self.o_proj = nn.Linear(heads * dim, width, bias=False)
        self.atlas = AtlasMemory(width)
        self._start()

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        *,
        segment_ids: Int64[Tensor, "batch length"] | None = None,
        state: MemoryState | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], MemoryState]:
        """What the memory says about every token, and its state after the last."""
        conv_state, projection_state, memory_state = state if state is not None else (None, None, None)
        mixed, conv_state = self.conv(self.in_proj(x), segment_ids=segment_ids, state=conv_state)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=-1))
        read, projection_state, memory_state = self.write_and_read(
            _unit(q),
            _unit(k),
            v,
            beta=None if self.beta is None else torch.sigmoid(widened(self.beta(x))).mT,
            log_decay=None if self.decay is None else _log_decay(self.decay(x)),
            segment_ids=segment_ids,
            state=(projection_state, memory_state),
        )
        out = self.atlas(self.o_proj(_bounded(read).transpose(1, 2).flatten(2)))
        return out, MemoryState(conv_state, projection_state, memory_state)

    def write_and_read(
        self,
        q: Float[Tensor, "batch heads length dim"],
        k: Float[Tensor, "batch heads length dim"],
        v: Float[Tensor, "batch heads length dim"],
        *,
        beta: Float[Tensor, "batch heads length"] | None = None,
        log_decay: Float[Tensor, "batch heads length"] | None = None,
        segment_ids: Int64[Tensor, "batch length"] | None = None,
        state: tuple[ProjectionState | None, AssociativeState | None] = (None, None),
    ) -> tuple[Float[Tensor, "batch heads length dim"], ProjectionState, AssociativeState]:
        """r_t = S_t ((1 - s) q_t + s q'_t), before it is bent, and both accumulators' states.

        Args:
            q, k, v: queries and keys of unit length, or of length 0 where nothing is asked or written.
            beta, log_decay: as for ``AssociativeMemory``.
            segment_ids: as for ``causal_projection``.
            state: of both accumulators after the tokens before these.
        """
        projected, projection_state = self.projection(q, k, segment_ids=segment_ids, state=state[0])
        read, memory_state = self.memory(
            torch.lerp(q, projected, self.share[:, None, None].to(q.dtype)),
            k,
            v,
            beta=beta,
            log_decay=log_decay,
            segment_ids=segment_ids,
            state=state[1],
        )
        return read, projection_state, memory_state

    @property
    def share(self) -> Float[Tensor, " heads"]:
        """s, the projected query's share of what reads the memory."""
        return torch.sigmoid(self.share_logit)

    @property
    def resting_log_decay(self) -> Float[Tensor, " heads"] | None:
        """Log alpha of a token that says nothing about it; None for rules that do not forget."""
        return None if self.decay is None else _log_decay(self.decay.bias[None, None])[0, :, 0]

    @torch.no_grad()
    def _start(self) -> None:
        """The induction head of the class's description."""
        inner, width = self.o_proj.in_features, self.o_proj.out_features
        nn.init.normal_(self.in_proj.weight, std=width**-0.5)
        query, key, value = self.in_proj.weight.chunk(3)
        key.copy_(query)
        # W_v^T W_v is inner / width on the mean of its diagonal
        self.o_proj.weight.copy_(value.T * (width / inner))
        if self.conv.taps > 1:
            taps = self.conv.weight[:, inner : 2 * inner]
            taps[1] = 1.0
            # a shard's first token has none before it, and a key of zero would have no direction
            taps[0] = 0.1


def _unit(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """x / sqrt(|x|^2 + 1e-6), which has a slope at zero too; taken in float32 at least."""
    wide = widened(x)
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def _bounded(read: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """r / sqrt(1 + mean(r^2) / 16): r itself while of a token's scale, and never beyond 4 times that."""
    wide = widened(read)
    return (wide * torch.rsqrt(1 + wide.square().mean(dim=-1, keepdim=True) / _READ_BOUND**2)).to(read.dtype)


def _log_decay(logits: Float[Tensor, "batch length heads"]) -> Float[Tensor, "batch heads length"]:
    return F.logsigmoid(widened(logits) + _DECAY_LOGIT).mT / _DECAY_TEMPERATURE
