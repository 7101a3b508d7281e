"""What was seen, projected onto a query, and what was stored, read back: one causal accumulator, twice."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from theria.memory.accumulator import (
    RULES,
    causal_read,
    check_kernel,
    state_dtype,
    widened,
    without_autocast,
)
from theria.memory.fla_kernels import Rule
from theria.memory.hebbian import running_sum
from theria.memory.persistent import PersistentMemory
from theria.memory.shards import shards_of

_LEAST_NORM = 1e-8


class ProjectionState(NamedTuple):
    """What ``causal_projection`` carries from one call to the next.

    Attributes:
        memory: M_t, persistent part included, in float32, or float64 for float64.
        norm_sum: norm_persistent and what was added to it.
        segment: the segment id of the last token; None (as 0) where none was given yet.
    """

    memory: Float[Tensor, "batch heads dim dim"]
    norm_sum: Float[Tensor, "batch heads"]
    segment: Int64[Tensor, " batch"] | None = None


class AssociativeState(NamedTuple):
    """What ``AssociativeMemory`` carries from one call to the next.

    Attributes:
        memory: S_t, in float32, or float64 for float64.
        segment: the segment id of the last token; None (as 0) where none was given yet.
    """

    memory: Float[Tensor, "batch heads value_dim key_dim"]
    segment: Int64[Tensor, " batch"] | None = None


# The tensors carry no jaxtyping shapes: the function refuses wrong shapes by itself, in words.
def causal_projection(
    q: Tensor,
    k: Tensor,
    m_persistent: Tensor,
    norm_persistent: Tensor,
    *,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    state: ProjectionState | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, ProjectionState]:
    r"""q'_t = M_t q_t / max(norm_sum_t, 1e-8), per sequence and head.

    .. math::
        M_t = M_{persistent} + \sum_{i \le t} k_i k_i^T, \qquad
        norm\_sum_t = norm_{persistent} + \sum_{i \le t} |k_i|^2

    with sums over the tokens of t's shard: where a shard begins, both M and norm_sum are what they are in
    ``m_persistent`` and ``norm_persistent``. No gradient crosses a shard boundary; it is exactly zero.
    Sums and states are float32 (float64 for float64) under autocast too. Called token by token with the
    state of the call before, it gives what one call gives.

    Args:
        q, k: (batch, heads, length, dim).
        m_persistent: (heads, dim, dim).
        norm_persistent: (heads,).
        segment_ids: (batch, length), int64 and non-decreasing; a token whose id is not that of the token
            before it begins a shard. None: all tokens continue the state's shard.
        chunk_size: tokens that are computed together; any gives the same numbers up to rounding.
        state: of the call that ended where this one begins; None for the start of a shard.
        kernel: "auto", "tensor" or "fla", see ``theria.memory.resolve_kernel``.

    Returns:
        q' (batch, heads, length, dim) in q's dtype, before any learned scale, and the state after it.

    Raises:
        ValueError: for shapes, dtypes, a kernel's name or a chunk size that make no call.
        NotImplementedError: if kernel="fla" cannot do the call.
    """
    _check_projection(q, k, m_persistent, norm_persistent)
    batch, _, length, _ = q.shape
    dtype = state_dtype(q.dtype)
    m_persistent, norm_persistent = m_persistent.to(dtype), norm_persistent.to(dtype)
    if state is None:
        state = _fresh(m_persistent, norm_persistent, batch)
    ranks, segment = shards_of(segment_ids, state.segment, batch, length)

    # Where shards begin inside the call the accumulator holds what M has beyond its persistent part, which is
    # zero there; the persistent part is read by itself. Without shards it is one more term of the state.
    inside = ranks is not None
    carried = state.memory - m_persistent if inside else state.memory
    counted = state.norm_sum - norm_persistent if inside else state.norm_sum
    projected, memory = causal_read(
        "hebbian",
        q,
        k,
        k,
        beta=None,
        log_decay=None,
        ranks=ranks,
        initial=carried.mT,
        chunk_size=chunk_size,
        kernel=kernel,
        constant=m_persistent.mT if inside else None,
    )
    memory = memory.mT
    with without_autocast(q):
        norm_sum, counted = running_sum(widened(k).square().sum(dim=-1), ranks, counted)
        if inside:
            norm_sum = norm_sum + norm_persistent.unsqueeze(-1)
            memory, counted = memory + m_persistent, counted + norm_persistent
        projected = projected / norm_sum.clamp_min(_LEAST_NORM).unsqueeze(-1)
    return projected.to(q.dtype), ProjectionState(memory, counted, segment)


class QKProjection(nn.Module):
    """``causal_projection`` from a persistent memory, times a learned scale.

    |q'| / |q| of the projection falls towards 1 / dim, since the eigenvalues of M_t / norm_sum add up to 1; a
    scale per head that starts at dim makes up for it. (An RMSNorm would cancel norm_sum.) For random unit
    keys and queries the ratio is then about sqrt(1 + dim / t) after t tokens, and below that while
    norm_persistent still counts.

    Args:
        persistent: P, its heads and width are those of the projection.
        chunk_size, kernel: as for ``causal_projection``.

    Attributes:
        relative_scale: (heads,), the learned scale over dim; 1 at the start.
    """

    def __init__(self, persistent: PersistentMemory, *, chunk_size: int = 64, kernel: str = "auto") -> None:
        super().__init__()
        check_kernel(kernel, chunk_size)
        _, heads, self.dim = persistent.vectors.shape
        self.persistent = persistent
        self.chunk_size = chunk_size
        self.kernel = kernel
        self.relative_scale = nn.Parameter(torch.ones(heads))

    @property
    def scale(self) -> Float[Tensor, " heads"]:
        """What the projection is multiplied by, dim at the start."""
        return self.dim * self.relative_scale

    def forward(
        self,
        q: Float[Tensor, "batch heads length dim"],
        k: Float[Tensor, "batch heads length dim"],
        *,
        segment_ids: Int64[Tensor, "batch length"] | None = None,
        state: ProjectionState | None = None,
    ) -> tuple[Float[Tensor, "batch heads length dim"], ProjectionState]:
        """Scaled q' in q's dtype, and the state after it."""
        projected, state = causal_projection(
            q,
            k,
            self.persistent.m_persistent,
            self.persistent.norm_persistent,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            state=state,
            kernel=self.kernel,
        )
        return (projected * self.scale[:, None, None]).to(q.dtype), state

    def reset_at_shard_boundary(self, batch: int) -> ProjectionState:
        """The state that a shard begins with: the persistent numerator and the persistent denominator."""
        return _fresh(self.persistent.m_persistent, self.persistent.norm_persistent, batch)


class AssociativeMemory(nn.Module):
    r"""Pairs (k_i, v_i) stored one after the other, and r_t = S_t q_t read back at every token.

    ============ =====================================================================
    hebbian      S_t = S_{t-1} + beta_t v_t k_t^T
    delta        S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    gated_delta  S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    ============ =====================================================================

    A token reads what it has stored itself. S is zero where a shard begins, and no gradient crosses the
    boundary. The delta rules want keys of unit length and beta in (0, 2) to stay bounded.

    Args:
        rule: "hebbian", "delta" or "gated_delta".
        chunk_size, kernel: as for ``causal_projection``.

    Raises:
        ValueError: for an unknown rule or kernel.
    """

    def __init__(self, rule: str = "delta", *, chunk_size: int = 64, kernel: str = "auto") -> None:
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, received {rule!r}")
        check_kernel(kernel, chunk_size)
        self.rule = next(known for known in RULES if known == rule)
        self.chunk_size = chunk_size
        self.kernel = kernel

    # No jaxtyping shapes: wrong ones are refused in words.
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        beta: Tensor | None = None,
        log_decay: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: AssociativeState | None = None,
    ) -> tuple[Tensor, AssociativeState]:
        """Read and write a sequence.

        Args:
            q, k: (batch, heads, length, key_dim).
            v: (batch, heads, length, value_dim).
            beta: (batch, heads, length), strength of the writes; 1 where it is None.
            log_decay: (batch, heads, length), log alpha, at most 0; for "gated_delta", which needs it.
            segment_ids: (batch, length), as for ``causal_projection``.
            state: of the call before; None for an empty memory.

        Returns:
            r (batch, heads, length, value_dim) in q's dtype, and the state after the last token.

        Raises:
            ValueError: for shapes that make no call, or a log_decay missing or not wanted by the rule.
            NotImplementedError: if kernel="fla" cannot do the call.
        """
        _check_memory(self.rule, q, k, v, beta, log_decay)
        batch, heads, length, key_dim = q.shape
        if state is None:
            empty = q.new_zeros(batch, heads, v.shape[-1], key_dim, dtype=state_dtype(q.dtype))
            state = AssociativeState(empty)
        ranks, segment = shards_of(segment_ids, state.segment, batch, length)
        read, memory = causal_read(
            self.rule,
            q,
            k,
            v,
            beta=beta,
            log_decay=log_decay,
            ranks=ranks,
            initial=state.memory.mT,
            chunk_size=self.chunk_size,
            kernel=self.kernel,
        )
        return read.to(q.dtype), AssociativeState(memory.mT, segment)


def _fresh(
    m_persistent: Float[Tensor, "heads dim dim"], norm_persistent: Float[Tensor, " heads"], batch: int
) -> ProjectionState:
    return ProjectionState(m_persistent.expand(batch, *m_persistent.shape), norm_persistent.expand(batch, -1))


def _check_projection(q: Tensor, k: Tensor, m_persistent: Tensor, norm_persistent: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError(
            f"q and k must be of one dtype and one shape (batch, heads, length, dim), received "
            f"{q.dtype} {tuple(q.shape)} and {k.dtype} {tuple(k.shape)}"
        )
    heads, dim = q.shape[1], q.shape[3]
    if m_persistent.shape != (heads, dim, dim) or norm_persistent.shape != (heads,):
        raise ValueError(
            f"m_persistent must be (heads, dim, dim) = {(heads, dim, dim)} and norm_persistent (heads,) = "
            f"{(heads,)}, received {tuple(m_persistent.shape)} and {tuple(norm_persistent.shape)}"
        )


def _check_memory(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None
) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or v.ndim != 4:
        raise ValueError(
            "q and k must be (batch, heads, length, key_dim) and v (batch, heads, length, value_dim), "
            f"received {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, tensor in (("beta", beta), ("log_decay", log_decay)):
        if tensor is not None and tensor.shape != q.shape[:3]:
            raise ValueError(
                f"{name} must be (batch, heads, length) = {tuple(q.shape[:3])}, "
                f"received {tuple(tensor.shape)}"
            )
    if (log_decay is not None) != (rule == "gated_delta"):
        received = "none" if log_decay is None else "one"
        raise ValueError(
            f"log_decay is what rule 'gated_delta' needs and no other takes; "
            f"rule {rule!r} received {received}"
        )
