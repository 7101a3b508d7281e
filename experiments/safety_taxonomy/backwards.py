"""Attention with the forward of a sound implementation and a backward of our own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from theria.curvature.convention import Attention

Gradients = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(query, key, value, cotangent of the output) -> their gradients."""


class Rewired(Function):
    """The forward of one function, and gradients that another computes."""

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], gradients: Gradients, *inputs: Tensor) -> Tensor:
        """Attention by the first function."""
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs)
        return attend(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        """Gradients by the second."""
        return None, None, *ctx.gradients(*ctx.saved_tensors, cotangent)


class RewiredOnce(Rewired):
    """The same, refusing to be differentiated again."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        """Gradients without a graph, and a node that raises when it is differentiated."""
        return Rewired.backward(ctx, cotangent)


def rewired(
    gradients: Callable[[Attention, bool], Gradients], function: type[Rewired] = Rewired
) -> Callable[[Attention], Attention]:
    """The implementation's forward with a backward of our own."""

    def wrap(base: Attention) -> Attention:
        def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
            def forward(*inputs: Tensor) -> Tensor:
                return base(*inputs, is_causal=is_causal)

            return function.apply(forward, gradients(base, is_causal), query, key, value)

        return attend

    return wrap


def recomputed_and_differentiated(base: Attention, causal: bool) -> Gradients:
    """The forward recomputed on detached inputs and differentiated there: numbers without a graph."""

    def gradients(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        with torch.enable_grad():
            out = base(*leaves, is_causal=causal)
        return torch.autograd.grad(out, leaves, cotangent.detach())

    return gradients


def launched_by_formula(_: Attention, causal: bool) -> Gradients:
    """The textbook backward as a kernel computes it: numbers in, numbers out."""

    def gradients(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> Any:
        with torch.no_grad():
            return by_formula()(_, causal)(query, key, value, cotangent)

    return gradients


def recomputed_then_detached(base: Attention, causal: bool) -> Gradients:
    """The backward recomputed with a graph, and its results cut from it."""

    def gradients(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> Any:
        found = recomputed_and_differentiated(base, causal)(query, key, value, cotangent)
        return tuple(g + 0 * x for g, x in zip(found, (query, key, value), strict=True))

    return gradients


def by_formula(
    *, frozen_probabilities: bool = False, frozen_statistics: bool = False, factor: float = 1.0
) -> Callable[[Attention, bool], Gradients]:
    """The textbook backward in tensor operations, P = exp(S - lse), with parts of it held constant.

    Args:
        frozen_probabilities: P carries no derivative.
        frozen_statistics: lse carries none.
        factor: of the gradients of query and key.
    """

    def of(_: Attention, causal: bool) -> Gradients:
        def gradients(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> Any:
            scale = query.shape[-1] ** -0.5
            scores = query @ key.mT * scale
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            statistics = scores.logsumexp(-1, keepdim=True)
            p = (scores - (statistics.detach() if frozen_statistics else statistics)).exp()
            p = p.detach() if frozen_probabilities else p
            dp = cotangent @ value.mT
            ds = factor * scale * p * (dp - (p * dp).sum(-1, keepdim=True))
            return ds @ key, ds.mT @ query, p.mT @ cotangent

        return gradients

    return of
