"""Attention with an explicit softmax, differentiable to any order: what every other backend must equal."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from theria.attention.call import CausalAlignment, diagonal_offset
from theria.attention.masks import visible_keys


def reference_attention(
    query: Float[Tensor, "*batch queries dim"],
    key: Float[Tensor, "*key_batch keys dim"],
    value: Float[Tensor, "*key_batch keys value_dim"],
    *,
    is_causal: bool,
    window: int | None,
    causal_alignment: CausalAlignment,
    scale: float,
    enable_gqa: bool,
) -> Float[Tensor, "*batch queries value_dim"]:
    """O = P V with P = softmax(scale Q Kᵀ) over the keys that each query sees.

    A query that sees no key has P = 0, so its output and its derivatives of every order are zero.
    bfloat16 and float16 are computed in float32 throughout and rounded once, at the end. With
    ``enable_gqa`` consecutive query heads share a key-value head. The arguments are those of a call that
    ``describe_call`` has accepted.
    """
    dtype = query.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    if half:
        query, key, value = query.float(), key.float(), value.float()

    # One batch dimension, and the queries of all heads that share a key-value head as its rows: the keys
    # are never repeated, and bmm is half as many operations as matmul, above all under vmap.
    *leading, queries, dim = query.shape
    keys, value_dim = value.shape[-2:]
    batch = math.prod(key.shape[:-2])
    sharing = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    rows = (query * scale).reshape(batch, sharing * queries, dim)
    scores = torch.bmm(rows, key.reshape(batch, keys, dim).transpose(1, 2))
    value = value.reshape(batch, keys, value_dim)

    if is_causal:
        offset = diagonal_offset(queries, keys, causal_alignment)
        visible = visible_keys(queries, keys, window=window, offset=offset, device=query.device)
        visible = visible.repeat(sharing, 1)
        dead = ~visible.any(dim=1, keepdim=True)
        # The softmax of a row of nothing but -inf is NaN, and so are its derivatives: masking would hide
        # them, not from anomaly detection. Dead rows keep finite scores and are cleared afterwards.
        probabilities = scores.masked_fill(~(visible | dead), -math.inf).softmax(dim=-1).masked_fill(dead, 0)
    else:
        probabilities = scores.softmax(dim=-1)

    out = torch.bmm(probabilities, value).reshape(*leading, queries, value_dim)
    return out.to(dtype) if half else out
