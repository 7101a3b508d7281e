"""What an implementation is measured by: attention in float64, and sound ways to round it to half."""

import math
from functools import partial

from torch import Tensor

from theria.attention import scaled_dot_product_attention
from theria.attention.autograd import differentiable_attention
from theria.attention.call import CausalAlignment, diagonal_offset
from theria.attention.custom import CustomOperators
from theria.attention.masks import visible_keys
from theria.attention.operators import Band, Curvature, Gradients, Key, LogSumExp, Out, Query, Value
from theria.curvature.convention import Attention


def exact(alignment: CausalAlignment) -> Attention:
    """The explicit softmax, to be called in float64."""
    return partial(scaled_dot_product_attention, causal_alignment=alignment, backend="reference")


def rounded(alignment: CausalAlignment) -> tuple[Attention, ...]:
    """Sound ways to compute in the inputs' own dtype, so that the measure does not hang on one rounding well.

    The textbook formula with every operation rounded, the scale applied to the scores or half of it to either
    factor; and the formulas of fused kernels, which add in float32 but multiply and save in half.
    """
    return (
        partial(_textbook, alignment=alignment, split=False),
        partial(_textbook, alignment=alignment, split=True),
        partial(_fused, alignment=alignment),
    )


def _textbook(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    alignment: CausalAlignment,
    split: bool,
) -> Tensor:
    scale = query.shape[-1] ** -0.5
    factor = math.sqrt(scale)
    scores = (factor * query) @ (factor * key).mT if split else query @ key.mT * scale
    if not is_causal:
        return scores.softmax(-1) @ value
    queries, keys = scores.shape[-2:]
    offset = diagonal_offset(queries, keys, alignment)
    visible = visible_keys(queries, keys, window=None, offset=offset, device=query.device)
    dead = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~(visible | dead), -math.inf)
    return scores.softmax(-1).masked_fill(dead, 0) @ value


def _fused(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, alignment: CausalAlignment
) -> Tensor:
    band = Band.of_call(
        scale=query.shape[-1] ** -0.5,
        is_causal=is_causal,
        window=None,
        causal_alignment=alignment,
        queries=query.shape[-2],
        keys=key.shape[-2],
    )
    return differentiable_attention(query, key, value, _FusedFormulas(), band)[0]


class _FusedFormulas:
    """The operators of `theria.attention.operators` with the roundings that fused kernels make.

    The factors of every matrix product are rounded to the dtype of the inputs, and D = rowsum(dO O), m O and
    P = exp(S - lse) are taken from the output and lse that were saved. A peaked softmax feels that: what
    cancels in its second derivative cancels in exact arithmetic. For as many key-value heads as query heads.
    """

    def forward(self, query: Query, key: Key, value: Value, band: Band) -> tuple[Out, LogSumExp]:
        """O, rounded, and lse."""
        return CustomOperators().forward(query, key, value, band)

    def vjp(
        self, query: Query, key: Key, value: Value, out: Out, lse: LogSumExp, cotangent: Out, band: Band
    ) -> Gradients:
        """Gradient of <dO, O>."""
        q, k, v, o, do = (t.float() for t in (query, key, value, out, cotangent))
        p = _probabilities(q, k, lse, band)
        ds = _rounded(p * (do @ v.mT - (do * o).sum(-1, keepdim=True)), query)
        found = band.scale * ds @ k, band.scale * ds.mT @ q, _rounded(p, query).mT @ do
        return Gradients(*(t.to(query.dtype) for t in found))

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
        q, k, v, o = (t.float() for t in (query, key, value, out))
        a, b, c = (t.float() for t in tangents)
        p = _probabilities(q, k, lse, band)
        pt = p * (band.scale * (a @ k.mT + q @ b.mT))
        u = _rounded(pt, query) @ v - pt.sum(-1, keepdim=True) * o + _rounded(p, query) @ c
        return u.to(query.dtype)

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
        q, k, v, o, do = (t.float() for t in (query, key, value, out, cotangent))
        a, b, c = (t.float() for t in cotangents)
        p = _probabilities(q, k, lse, band)
        t = band.scale * (a @ k.mT + q @ b.mT)
        m = (p * t).sum(-1, keepdim=True)
        u = _rounded(p * t, query) @ v - m * o + _rounded(p, query) @ c
        dp = do @ v.mT
        d, e = (do * o).sum(-1, keepdim=True), (do * u).sum(-1, keepdim=True)
        ds = p * (dp - d)
        w = _rounded(p * (do @ c.mT - e) + ds * (t - m), query)
        ds = _rounded(ds, query)
        found = (
            band.scale * (ds @ b + w @ k),
            band.scale * (ds.mT @ a + w.mT @ q),
            _rounded(p * (t - m), query).mT @ do,
            u,
        )
        return Curvature(*(x.to(query.dtype) for x in found))

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
        q, k, v, o = (t.float() for t in (query, key, value, out))
        a1, b1, c1 = (t.float() for t in tangents)
        a2, b2, c2 = (t.float() for t in others)
        p = _probabilities(q, k, lse, band)
        t1 = band.scale * (a1 @ k.mT + q @ b1.mT)
        t2 = band.scale * (a2 @ k.mT + q @ b2.mT)
        t1, t2 = (t - (p * t).sum(-1, keepdim=True) for t in (t1, t2))
        w = p * (t1 * t2 + band.scale * (a1 @ b2.mT + a2 @ b1.mT))
        found = _rounded(w, query) @ v - w.sum(-1, keepdim=True) * o
        found = found + _rounded(p * t1, query) @ c2 + _rounded(p * t2, query) @ c1
        return found.to(query.dtype)


def _probabilities(q: Tensor, k: Tensor, lse: LogSumExp, band: Band) -> Tensor:
    """P = exp(S - lse); zero in rows that see no key, whose lse is +inf."""
    scores = band.scale * q @ k.mT
    if band.causal:
        visible = visible_keys(*scores.shape[-2:], window=None, offset=band.offset, device=q.device)
        scores = scores.masked_fill(~visible, -math.inf)
    return (scores - lse.unsqueeze(-1)).exp()


def _rounded(factor: Tensor, like: Tensor) -> Tensor:
    """As matrix units take it."""
    return factor.to(like.dtype).float()
