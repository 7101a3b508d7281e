"""Wrappers that cut something from the graph of a sound attention, or change its output.

The silent ones keep an edge of weight zero (x.detach() + 0 x): a plain detach makes autograd complain about
an unused input, and everybody notices.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from theria.curvature.convention import Attention


def silently_detached(tensor: Tensor) -> Tensor:
    """The same numbers on an edge of weight zero."""
    return tensor.detach() + 0 * tensor


def baseline(base: Attention) -> Attention:
    """The implementation itself."""
    return base


def detach_attention_output(base: Attention) -> Attention:
    """The output is cut from the graph."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        return silently_detached(base(query, key, value, is_causal=is_causal))

    return attend


def no_grad_attention(base: Attention) -> Attention:
    """The whole call runs under ``torch.no_grad()``."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        with torch.no_grad():
            return base(query, key, value, is_causal=is_causal)

    return attend


def detach_input(index: int) -> Callable[[Attention], Attention]:
    """One of query, key and value is cut from the graph."""

    def wrap(base: Attention) -> Attention:
        def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
            inputs = [query, key, value]
            inputs[index] = silently_detached(inputs[index])
            return base(*inputs, is_causal=is_causal)

        return attend

    return wrap


def stats_detach_logits_sdpa(base: Attention) -> Attention:
    """The logits are cut from the graph before the softmax, which the implementation takes of them."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        logits = silently_detached(query @ key.mT * query.shape[-1] ** -0.5)
        # attention of the logits over unit keys, at its own scale of 1 / sqrt(keys), is their softmax
        return base(logits * key.shape[-2] ** 0.5, _unit_rows(key), value, is_causal=is_causal)

    return attend


def stats_detach_softmax_output_sdpa(base: Attention) -> Attention:
    """The probabilities are cut from the graph; attention to unit values yields them."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        probabilities = base(query, key, _unit_rows(key), is_causal=is_causal)
        return silently_detached(probabilities) @ value

    return attend


def safe_checkpoint(base: Attention) -> Attention:
    """Non-reentrant checkpointing, which recomputes with a graph."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        return checkpoint(base, query, key, value, is_causal=is_causal, use_reentrant=False)

    return attend


def scaled_output(base: Attention) -> Attention:
    """The output is 1% too large."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        return 1.01 * base(query, key, value, is_causal=is_causal)

    return attend


def _unit_rows(key: Tensor) -> Tensor:
    """The identity (keys, keys) for every head."""
    keys = key.shape[-2]
    return torch.eye(keys, dtype=key.dtype, device=key.device).expand(*key.shape[:-2], keys, keys)
