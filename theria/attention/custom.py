"""The attention operators in plain tensor operations, at quadratic memory.

They leave the saved output and lse alone. Both are rounded, so that D = rowsum(dO O), m O and exp(S - lse)
would carry that rounding, times the size of scores and values, into every derivative. With all keys at hand P
is an exact softmax, D is rowsum(P dP), [P T] V - m O is [P (T - m)] V, and W V - rowsum(W) O likewise.

As functions of the other arguments they are themselves differentiable by autograd, which is how orders beyond
the operators' own are reached.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from theria.attention.masks import visible_keys
from theria.attention.operators import (
    Band,
    Curvature,
    Gradients,
    Key,
    LogSumExp,
    Out,
    Query,
    Value,
)

Scores = Float[Tensor, "batch kv_heads rows keys"]


class CustomOperators:
    """`theria.attention.operators.AttentionOperators` in tensor operations, for any float type and device."""

    def forward(self, query: Query, key: Key, value: Value, band: Band) -> tuple[Out, LogSumExp]:
        """O = P V and lse."""
        q, k, v = _grouped(query, key), _wide(key), _wide(value)
        scores, dead = _scores(q, k, query.shape[-2], band)
        out = _softmax(scores, dead) @ v
        lse = torch.logsumexp(scores, dim=-1)
        lse = lse.masked_fill(torch.isneginf(lse), math.inf)
        return _ungrouped(out, query), lse.reshape(query.shape[:-1])

    def vjp(
        self, query: Query, key: Key, value: Value, out: Out, lse: LogSumExp, cotangent: Out, band: Band
    ) -> Gradients:
        """Gradient of <dO, O>."""
        q, k, v, do = _grouped(query, key), _wide(key), _wide(value), _grouped(cotangent, key)
        p = _probabilities(q, k, query.shape[-2], band)
        dp = do @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        return Gradients(
            _ungrouped(band.scale * ds @ k, query).to(query.dtype),
            (band.scale * ds.mT @ q).to(key.dtype),
            (p.mT @ do).to(value.dtype),
        )

    def jvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        tangents: Gradients,
        band: Band,
    ) -> Out:
        """Derivative of O along the tangents."""
        return jvp_formula(query, key, value, tangents, band)

    def hvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        cotangent: Out,
        cotangents: Gradients,
        band: Band,
    ) -> Curvature:
        """Gradient of <a, dQ> + <b, dK> + <c, dV>."""
        return hvp_formula(query, key, value, cotangent, cotangents, band)

    def second_jvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        tangents: Gradients,
        others: Gradients,
        band: Band,
    ) -> Out:
        """Second derivative of O along the tangents and the others."""
        return second_jvp_formula(query, key, value, tangents, others, band)


def jvp_formula(query: Query, key: Key, value: Value, tangents: Gradients, band: Band) -> Out:
    """U of `theria.attention.operators`, traceable by autograd in every argument."""
    q, k, v = _grouped(query, key), _wide(key), _wide(value)
    a, b, c = _grouped(tangents.query, key), _wide(tangents.key), _wide(tangents.value)
    p = _probabilities(q, k, query.shape[-2], band)
    t = band.scale * (a @ k.mT + q @ b.mT)
    u = (p * (t - (p * t).sum(-1, keepdim=True))) @ v + p @ c
    return _ungrouped(u, query).to(query.dtype)


def hvp_formula(
    query: Query, key: Key, value: Value, cotangent: Out, cotangents: Gradients, band: Band
) -> Curvature:
    """The curvature of `theria.attention.operators`, traceable by autograd in every argument."""
    q, k, v, do = _grouped(query, key), _wide(key), _wide(value), _grouped(cotangent, key)
    a, b, c = _grouped(cotangents.query, key), _wide(cotangents.key), _wide(cotangents.value)
    p = _probabilities(q, k, query.shape[-2], band)
    t = band.scale * (a @ k.mT + q @ b.mT)
    m = (p * t).sum(-1, keepdim=True)
    u = (p * (t - m)) @ v + p @ c
    dp = do @ v.mT
    d = (p * dp).sum(-1, keepdim=True)
    e = (do * u).sum(-1, keepdim=True)
    ds = p * (dp - d)
    w = p * (do @ c.mT + (dp - d) * t - m * dp - (e - m * d))
    return Curvature(
        _ungrouped(band.scale * (ds @ b + w @ k), query).to(query.dtype),
        (band.scale * (ds.mT @ a + w.mT @ q)).to(key.dtype),
        ((p * (t - m)).mT @ do).to(value.dtype),
        _ungrouped(u, query).to(query.dtype),
    )


def second_jvp_formula(
    query: Query, key: Key, value: Value, tangents: Gradients, others: Gradients, band: Band
) -> Out:
    """D²O of `theria.attention.operators`, traceable by autograd in every argument."""
    q, k, v = _grouped(query, key), _wide(key), _wide(value)
    a1, b1, c1 = _grouped(tangents.query, key), _wide(tangents.key), _wide(tangents.value)
    a2, b2, c2 = _grouped(others.query, key), _wide(others.key), _wide(others.value)
    p = _probabilities(q, k, query.shape[-2], band)
    t1 = band.scale * (a1 @ k.mT + q @ b1.mT)
    t2 = band.scale * (a2 @ k.mT + q @ b2.mT)
    t1 = t1 - (p * t1).sum(-1, keepdim=True)
    t2 = t2 - (p * t2).sum(-1, keepdim=True)
    w = t1 * t2 + band.scale * (a1 @ b2.mT + a2 @ b1.mT)
    w = p * (w - (p * w).sum(-1, keepdim=True))
    return _ungrouped(w @ v + (p * t1) @ c2 + (p * t2) @ c1, query).to(query.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In the type that is computed in: float32 for half precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _grouped(tensor: Tensor, key: Tensor) -> Float[Tensor, "batch kv_heads rows width"]:
    """The queries of all heads that share a key-value head, as the rows of one matrix."""
    batch, heads, queries, width = tensor.shape
    kv_heads = key.shape[1]
    return _wide(tensor).reshape(batch, kv_heads, heads // kv_heads * queries, width)


def _ungrouped(tensor: Float[Tensor, "batch kv_heads rows width"], query: Query) -> Tensor:
    return tensor.reshape(*query.shape[:-1], tensor.shape[-1])


def _scores(q: Tensor, k: Tensor, queries: int, band: Band) -> tuple[Scores, Tensor | None]:
    """S with -inf where a query does not see a key, and which rows see none (None where all see all)."""
    scores = band.scale * q @ k.mT
    if not band.causal:
        return scores, None
    visible = visible_keys(queries, k.shape[-2], window=band.window, offset=band.offset, device=q.device)
    visible = visible.repeat(q.shape[-2] // queries, 1)
    return scores.masked_fill(~visible, -math.inf), ~visible.any(-1, keepdim=True).expand(
        *scores.shape[:-1], 1
    )


def _probabilities(q: Tensor, k: Tensor, queries: int, band: Band) -> Scores:
    return _softmax(*_scores(q, k, queries, band))


def _softmax(scores: Scores, dead: Tensor | None) -> Scores:
    if dead is None:
        return scores.softmax(-1)
    # a softmax of nothing but -inf is NaN, in its derivatives too: dead rows pass it finite, then are cleared
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
