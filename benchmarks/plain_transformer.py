"""The peer of the memory language model: a plain decoder under PyTorch's own attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theria.memory import GatedMLP
from theria.models.window_attention import rotate, rotation_of


class PlainBlock(nn.Module):
    """Causal self-attention by ``F.scaled_dot_product_attention``, then a gated MLP, both before RMSNorms."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = GatedMLP(width, hidden)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """The tokens (batch, length, width) after the block."""
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, is_causal=True)
        x = x + self.o_proj(read.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class PlainTransformer(nn.Module):
    """Tied embeddings, rotary positions and ``PlainBlock``s; every token sees all before it.

    Args:
        vocab: number of tokens.
        width, blocks, heads: of the decoder.
        hidden: of the MLPs.
    """

    def __init__(self, vocab: int, *, width: int, blocks: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.embedding = nn.Embedding(vocab, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, hidden) for _ in range(blocks))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocab) of the token after each."""
        rotation = rotation_of(0, tokens.shape[1], self.head_dim, device=tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation)
        return F.linear(self.norm(x), self.embedding.weight)

    def training_flops_per_token(self, length: int) -> float:
        """As ``theria.models.flops`` counts: three times two a weight, and 4 width a visible key."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear | nn.Embedding))
        width = self.embedding.embedding_dim
        return 3.0 * (2 * weights + 4 * width * len(self.blocks) * (length + 1) / 2)


def plain_peer(parameters: int, *, vocab: int, width: int, blocks: int, heads: int) -> PlainTransformer:
    """A plain transformer of that width and depth, its MLPs as wide as that many parameters want."""
    with torch.device("meta"):
        narrow = PlainTransformer(vocab, width=width, blocks=blocks, heads=heads, hidden=8)
    rest = parameters - sum(p.numel() for p in narrow.parameters())
    # a multiple of 8, which tensor cores want
    hidden = 8 + 8 * round(rest / (3 * width * blocks) / 8)
    return PlainTransformer(vocab, width=width, blocks=blocks, heads=heads, hidden=max(8, hidden))
