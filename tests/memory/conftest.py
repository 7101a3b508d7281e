"""The memories stated one token at a time, in plain sums, and inputs for them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

NaiveMemory = Callable[..., tuple[Tensor, Any]]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def naive_projection() -> NaiveMemory:
    """The arguments of ``causal_projection``; returns q', M and norm_sum after the last token."""

    def project(
        q: Tensor,
        k: Tensor,
        m_persistent: Tensor,
        norm_persistent: Tensor,
        *,
        segment_ids: Tensor | None = None,
        state: Any = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sequences, memories, norms = [], [], []
        for b in range(len(q)):
            memory, norm, segment = m_persistent, norm_persistent, 0
            if state is not None:
                memory, norm = state.memory[b], state.norm_sum[b]
                segment = 0 if state.segment is None else int(state.segment[b])
            tokens = []
            for t in range(q.shape[2]):
                if segment_ids is not None and int(segment_ids[b, t]) != segment:
                    memory, norm, segment = m_persistent, norm_persistent, int(segment_ids[b, t])
                key = k[b, :, t]
                memory = memory + key[:, :, None] * key[:, None, :]
                norm = norm + (key * key).sum(-1)
                read = (memory * q[b, :, t, None, :]).sum(-1)
                tokens.append(read / norm.clamp_min(1e-8)[:, None])
            sequences.append(torch.stack(tokens, dim=1))
            memories.append(memory)
            norms.append(norm)
        return torch.stack(sequences), (torch.stack(memories), torch.stack(norms))

    return project


@pytest.fixture(scope="session")
def naive_memory() -> NaiveMemory:
    """A rule and the arguments of ``AssociativeMemory.forward``; returns the reads and the last S."""

    def remember(
        rule: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        beta: Tensor | None = None,
        log_decay: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: Any = None,
    ) -> tuple[Tensor, Tensor]:
        sequences, memories = [], []
        for b in range(len(q)):
            empty = q.new_zeros(q.shape[1], v.shape[-1], q.shape[-1])
            memory, segment = empty, 0
            if state is not None:
                memory = state.memory[b]
                segment = 0 if state.segment is None else int(state.segment[b])
            tokens = []
            for t in range(q.shape[2]):
                if segment_ids is not None and int(segment_ids[b, t]) != segment:
                    memory, segment = empty, int(segment_ids[b, t])
                key, value = k[b, :, t, None, :], v[b, :, t, :, None]
                strength = 1.0 if beta is None else beta[b, :, t, None, None]
                if rule == "gated_delta":
                    assert log_decay is not None
                    memory = memory * log_decay[b, :, t, None, None].exp()
                if rule != "hebbian":
                    value = value - (memory * key).sum(-1, keepdim=True)
                memory = memory + strength * value * key
                tokens.append((memory * q[b, :, t, None, :]).sum(-1))
            sequences.append(torch.stack(tokens, dim=1))
            memories.append(memory)
        return torch.stack(sequences), torch.stack(memories)

    return remember


@pytest.fixture(scope="session")
def draw() -> Callable[..., SimpleNamespace]:
    """Random arguments: q, unit k, v, beta, log_decay, an unsymmetric m_persistent, norm_persistent, ids."""

    def sample(
        batch: int = 2,
        heads: int = 2,
        length: int = 37,
        dim: int = 5,
        value_dim: int = 4,
        *,
        dtype: torch.dtype = torch.float64,
        boundaries: float = 0.15,
        seed: int = 0,
    ) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

        starts = torch.rand(batch, length, generator=generator) < boundaries
        return SimpleNamespace(
            q=normal(batch, heads, length, dim),
            k=F.normalize(normal(batch, heads, length, dim), dim=-1),
            v=normal(batch, heads, length, value_dim),
            beta=1.5 * uniform(batch, heads, length),
            log_decay=-uniform(batch, heads, length),
            m_persistent=normal(heads, dim, dim),
            norm_persistent=uniform(heads),
            # ids that jump, begin above 0 and are not the ranks of their shards
            segment_ids=3 * starts.long().cumsum(dim=1) + 7,
        )

    return sample
