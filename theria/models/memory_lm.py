"""A language model of attention over a window beside a memory, mixed by gates."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from theria.memory import GatedMLP, MemoryBranch, MemoryState, TokenGate
from theria.memory.accumulator import state_dtype, widened
from theria.models.window_attention import AttentionState, WindowAttention, rotation_of

_EMBEDDING_STD = 0.02


class BlockState(NamedTuple):
    """State of a block; ``memory`` is None where the memory was off."""

    attention: AttentionState
    memory: MemoryState | None


class MemoryLMState(NamedTuple):
    """What ``MemoryLM`` carries from one call to the next: its position and one state a block."""

    position: int
    blocks: tuple[BlockState, ...]


class MemoryLMOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        logits: of the token after each token.
        gates: of every block, with their graph; None where the memory is off.
        state: after the last token.
    """

    logits: Float[Tensor, "batch length vocab"]
    gates: Float[Tensor, "blocks batch length heads"] | None
    state: MemoryLMState


class AtlasMAGBlock(nn.Module):
    """Memory as a gate: attention a and memory m of the same normed tokens, mixed per token and head.

        x <- x + D(W_out((1 - g) a + g m)),    x <- x + D(MLP(RMSNorm(x)))

    a is what the attention heads read before their output projection W_out; m is divided among the same
    heads. Without a memory g is 0. D is dropout in training.

    Args:
        attention: of the block's width.
        memory: of the same width; None for a block of attention alone.
        mlp_hidden: hidden width of the gated MLP.
        dropout: share of what is added to the residual stream that training drops.
    """

    def __init__(
        self,
        attention: WindowAttention,
        memory: MemoryBranch | None,
        *,
        mlp_hidden: int,
        dropout: float | int = 0.0,
    ) -> None:
        super().__init__()
        width = attention.heads * attention.head_dim
        self.norm = nn.RMSNorm(width)
        self.attention = attention
        self.memory = memory
        self.gate = None if memory is None else TokenGate(width, attention.heads)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = GatedMLP(width, mlp_hidden)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def start(self, *, added_variance: float) -> None:
        """Draw the weights anew, for outputs of the given variance where attention's and the MLP's are 1.

        Half of the identity is added to W_out: what memory says in terms of the residual stream then gets
        there as it is.
        """
        width = self.o_proj.in_features
        for linear in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)
        for linear in (self.o_proj, self.mlp.w1, self.mlp.w2, self.mlp.w3):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.o_proj.weight.mul_(added_variance**0.5)
        self.mlp.w1.weight.mul_(added_variance**0.5)
        if self.memory is not None:
            self.o_proj.weight.diagonal().add_(0.5)

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        rotation: Float[Tensor, "2 length half"],
        *,
        segment_ids: Int64[Tensor, "batch length"] | None = None,
        state: BlockState | None = None,
        memory_enabled: bool = True,
    ) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, "batch length heads"] | None, BlockState]:
        """The tokens, the gates (None without memory) and the state after the last token."""
        normed = self.norm(x)
        attention_state, memory_state = state if state is not None else (None, None)
        mixed, attention_state = self.attention(
            normed, rotation, segment_ids=segment_ids, state=attention_state
        )
        gate = None
        if memory_enabled and self.memory is not None and self.gate is not None:
            said, memory_state = self.memory(normed, segment_ids=segment_ids, state=memory_state)
            gate = self.gate(normed)
            share = gate.unsqueeze(-1).to(mixed.dtype)
            mixed = (1 - share) * mixed + share * said.unflatten(-1, mixed.shape[-2:])
        x = x + self.dropout(self.o_proj(mixed.flatten(2)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, gate, BlockState(attention_state, memory_state)


class MemoryLM(nn.Module):
    """Decoder of ``AtlasMAGBlock`` over tied embeddings, with rotary positions and RMSNorm.

    Shards of a packed batch do not see one another at all: attention, convolution, projection and memory
    each stop at a boundary, so a packed batch gives the logits of its shards taken alone, and the gradient
    across a boundary is exactly zero. (The memory needs that by specification; attention follows it, since
    what it carried over a boundary would be written into the next shard's memory.)

    Args:
        vocab: number of tokens.
        width, blocks, heads: of the decoder; width / heads an even number.
        window: tokens that attention sees, its own included.
        memory_heads: of each block's memory; 0 for a decoder of attention alone.
        memory_dim: width of a memory head.
        rule: write rule of the associative memory.
        slots: persistent vectors a memory head.
        taps: tokens the memory's convolution sees.
        mlp_hidden: hidden width of the MLPs; 8/3 of the width, rounded up to a multiple of 8, by default.
        dropout: share of what blocks add to the residual stream that training drops.
        chunk_size, kernel: of the accumulators.
        backend: of attention.

    Attributes:
        memory_enabled: set it to False to run the same weights with every gate shut, as a control.

    Raises:
        ValueError: for sizes that do not fit, an unknown rule, kernel or backend.
    """

    def __init__(
        self,
        vocab: int,
        *,
        width: int,
        blocks: int,
        heads: int,
        window: int,
        memory_heads: int = 2,
        memory_dim: int = 256,
        rule: str = "delta",
        slots: int = 64,
        taps: int = 4,
        mlp_hidden: int | None = None,
        dropout: float | int = 0.0,
        chunk_size: int = 64,
        kernel: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size, least in (
            ("vocab", vocab, 1),
            ("blocks", blocks, 1),
            ("memory_heads", memory_heads, 0),
        ):
            if size < least:
                raise ValueError(f"{name} must be at least {least}, received {size}")
        hidden = mlp_hidden if mlp_hidden is not None else -(-width // 3) * 8
        self.head_dim = width // heads
        self.memory_enabled = True
        # times sqrt(width) a token's variance is 1, and as output weights they give logits of variance 1
        self.embedding = nn.Embedding(vocab, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        built = []
        for _ in range(blocks):
            attention = WindowAttention(width, heads, window=window, backend=backend)
            memory = None
            if memory_heads:
                memory = MemoryBranch(
                    width,
                    heads=memory_heads,
                    dim=memory_dim,
                    rule=rule,
                    slots=slots,
                    taps=taps,
                    chunk_size=chunk_size,
                    kernel=kernel,
                )
            block = AtlasMAGBlock(attention, memory, mlp_hidden=hidden, dropout=dropout)
            block.start(added_variance=1 / (2 * blocks))
            built.append(block)
        self.blocks = nn.ModuleList(built)
        self.norm = nn.RMSNorm(width)

    # No jaxtyping shape on tokens: wrong ones are refused in words.
    def forward(
        self, tokens: Tensor, *, segment_ids: Tensor | None = None, state: MemoryLMState | None = None
    ) -> MemoryLMOutput:
        """Logits of the token after each of ``tokens``.

        Args:
            tokens: (batch, length), int64.
            segment_ids: (batch, length), int64 and non-decreasing, a new id begins a shard; None for one
                shard, or for the state's shard continued.
            state: of the call that ended where this one begins, under the same ``memory_enabled``.

        Raises:
            ValueError: for tokens that are not (batch, length >= 1), or a state of another model.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be (batch, length >= 1), received {tuple(tokens.shape)}")
        if state is not None:
            self._check_state(state)
        length = tokens.shape[1]
        position = 0 if state is None else state.position
        rotation = rotation_of(
            position,
            length,
            self.head_dim,
            device=tokens.device,
            dtype=state_dtype(self.embedding.weight.dtype),
        )
        before: Sequence[BlockState | None] = [None] * len(self.blocks) if state is None else state.blocks
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        gates, after = [], []
        for block, block_state in zip(self.blocks, before, strict=True):
            x, gate, block_state = block(
                x,
                rotation,
                segment_ids=segment_ids,
                state=block_state,
                memory_enabled=self.memory_enabled,
            )
            after.append(block_state)
            if gate is not None:
                gates.append(gate)
        logits = F.linear(self.norm(x), self.embedding.weight)
        stacked = torch.stack(gates) if gates else None
        return MemoryLMOutput(logits, stacked, MemoryLMState(position + length, tuple(after)))

    def _check_state(self, state: MemoryLMState) -> None:
        """Raise ValueError for a state that a model of other blocks, or with its memory off, has left."""
        remember = [self.memory_enabled and block.memory is not None for block in self.blocks]
        remembered = [block.memory is not None for block in state.blocks]
        if remember != remembered:
            raise ValueError(
                f"the state must be of {len(remember)} blocks, {sum(remember)} of them with memory, received "
                f"{len(remembered)} and {sum(remembered)}"
            )

    @torch.no_grad()
    def generate(
        self,
        prompt: Int64[Tensor, "batch length"],
        new_tokens: int,
        *,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int64[Tensor, "batch total"]:
        """The prompt and ``new_tokens`` sampled after it, one at a time from a state of bounded size.

        Args:
            prompt: at least one token a sequence.
            new_tokens: how many to add.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample among the k likeliest alone.
            generator: of the random numbers, on the prompt's device.

        Raises:
            ValueError: for a negative temperature or number of tokens, or top_k below 1.
        """
        if new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                "new_tokens and temperature must be at least 0 and top_k at least 1, received "
                f"{new_tokens}, {temperature} and {top_k}"
            )
        sequence, fresh, state = [prompt], prompt, None
        for _ in range(new_tokens):
            logits, _, state = self(fresh, state=state)
            fresh = _sample(widened(logits[:, -1]), temperature, top_k, generator)
            sequence.append(fresh)
        return torch.cat(sequence, dim=1)


def _sample(
    logits: Float[Tensor, "batch vocab"],
    temperature: float | int,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Int64[Tensor, "batch 1"]:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
