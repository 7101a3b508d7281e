"""Backends made of an operator set: one call, one launch, exact derivatives."""

import math

from torch import Tensor

from theria.attention.autograd import differentiable_attention
from theria.attention.call import CausalAlignment
from theria.attention.operators import AttentionOperators, Band
from theria.attention.reference import reference_attention
from theria.attention.registry import AttentionBackend


def backend_over(operators: AttentionOperators) -> AttentionBackend:
    """The attention backend that computes every call, and its derivatives, by ``operators``."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool,
        window: int | None,
        causal_alignment: CausalAlignment,
        scale: float,
        enable_gqa: bool,
    ) -> Tensor:
        if 0 in (query.numel(), key.numel(), value.numel()):
            # nothing to launch: the result is empty or zero, and so are its derivatives
            return reference_attention(
                query,
                key,
                value,
                is_causal=is_causal,
                window=window,
                causal_alignment=causal_alignment,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        band = Band.of_call(
            scale=scale,
            is_causal=is_causal,
            window=window,
            causal_alignment=causal_alignment,
            queries=query.shape[-2],
            keys=key.shape[-2],
        )
        q, k, v = (_with_batch_and_heads(t) for t in (query, key, value))
        out, _ = differentiable_attention(q, k, v, operators, band)
        return out.reshape(*query.shape[:-1], value.shape[-1])

    return attend


def _with_batch_and_heads(tensor: Tensor) -> Tensor:
    """(..., heads, length, width) as (batch, heads, length, width); no copy where strides allow a view."""
    *leading, length, width = tensor.shape
    heads = leading[-1] if leading else 1
    return tensor.reshape(math.prod(leading[:-1]), heads, length, width)
