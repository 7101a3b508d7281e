"""How many floating-point operations a memory language model asks for."""

from torch import nn

from theria.memory import MemoryBranch
from theria.models.memory_lm import MemoryLM
from theria.models.window_attention import WindowAttention

_RULE_PRODUCTS = {"hebbian": 2, "delta": 3, "gated_delta": 3}
"""Products of a matrix memory with a vector a token: a write and a read, and what delta rules correct by."""


def training_flops_per_token(model: MemoryLM, length: int) -> float:
    """Operations of forward and backward a token, by sequences of ``length``; a multiply-add counts two.

    Three times the forward's, which counts what the model's equations ask for and not what a kernel
    recomputes: two a weight of every linear map (the tied embedding as the output's), 4 width a visible key
    in attention, 2 d^2 a product with a memory of width d, a head and token. Element-wise work is left out.
    """
    embedding = model.embedding
    forward = 2.0 * embedding.num_embeddings * embedding.embedding_dim
    for module in model.modules():
        if isinstance(module, nn.Linear):
            forward += 2 * module.weight.numel()
        elif isinstance(module, WindowAttention):
            forward += 4 * module.heads * module.head_dim * visible_keys(length, module.window)
        elif isinstance(module, MemoryBranch):
            # the projection writes and reads a Hebbian memory of its own
            products = 2 + _RULE_PRODUCTS[module.memory.rule]
            forward += 2 * products * module.heads * module.projection.dim**2
    return 3 * forward


def visible_keys(length: int, window: int) -> float:
    """Keys that a token of a sequence sees on the mean, itself included."""
    seen = min(length, window)
    return (seen * (seen + 1) / 2 + (length - seen) * window) / length
