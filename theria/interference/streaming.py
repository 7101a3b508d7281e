"""The scores of one block of one layer, a chunk of its parameters at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from theria.interference.fisher import Denominator, Ridge, pooled_fisher
from theria.interference.gradients import SampleGradients
from theria.interference.layout import Projection
from theria.interference.scores import add_scores, empty_scores, weights
from theria.interference.store import Gradient, gradient_bias, gradient_rows, other_features, squared_norm

_CPU_CHUNK_BYTES = 32 * 2**20
"""Gradients beyond this leave the processor's cache between two operations on them."""


@dataclass(frozen=True)
class Settings:
    """What scores are asked for: the samples of both tasks in the store, variants, Fisher and ridge."""

    task_a: range
    task_b: range
    variants: Sequence[str]
    fisher: str
    ridge: Ridge


class BlockScores(NamedTuple):
    """Scores of one block of one layer and what its diagnostics are made of."""

    scores: Mapping[str, Float[Tensor, "heads a b"]]
    gradient_l1: Float[Tensor, "samples heads"]
    live_l1: Float[Tensor, "samples heads"]
    clamped: Int64[Tensor, " heads"]
    exceeded: Int64[Tensor, " heads"]
    zero: Int64[Tensor, " heads"]
    size: int
    missing: Bool[Tensor, " samples"]


def block_scores(
    gradients: SampleGradients,
    projection: Projection,
    features: Int64[Tensor, "heads head_dim"],
    settings: Settings,
) -> BlockScores:
    """Scores of the given features of a projection, weight and bias together.

    Samples without gradient count neither in the scores (their rows are left 0 here) nor in the Fisher mean.
    """
    both = range(
        min(settings.task_a.start, settings.task_b.start), max(settings.task_a.stop, settings.task_b.stop)
    )
    found = [gradients.store[sample].get(projection.module) for sample in both]
    block = _Block(gradients, projection, features, settings, both, found)
    block.add(biased=projection.module in gradients.biased and projection.side == "output")
    return block.result()


class _Block:
    """Sums over chunks of one block."""

    def __init__(
        self,
        gradients: SampleGradients,
        projection: Projection,
        features: Tensor,
        settings: Settings,
        both: range,
        found: Sequence[Gradient | None],
    ) -> None:
        self.projection, self.features, self.settings, self.found = projection, features, settings, found
        self.memory_bytes = gradients.memory_bytes
        self.like = torch.zeros((), dtype=gradients.dtype, device=gradients.device)
        self.task_a = _slice(settings.task_a, both)
        self.task_b = _slice(settings.task_b, both)
        self.present = torch.tensor([gradient is not None for gradient in found])
        self.count_a = int(self.present[self.task_a].sum())
        self.count_b = int(self.present[self.task_b].sum())
        heads, samples = len(features), len(found)
        shape = (heads, len(settings.task_a), len(settings.task_b))
        self.scores = empty_scores(settings.variants, shape, self.like)
        self.l1, self.live_l1 = (self.like.new_zeros(samples, heads) for _ in range(2))
        self.counts = torch.zeros(3, heads, dtype=torch.int64, device=gradients.device)
        self.size = 0

    def add(self, *, biased: bool) -> None:
        """Add the entries of the weight, chunk by chunk, and of the bias where it belongs to the block."""
        present = [gradient for gradient in self.found if gradient is not None]
        if not present:
            return
        others = other_features(present[0], self.projection.side)
        bias = self._bias() if biased else None
        mean = self._mean(bias, self.features.numel() * (others + biased))
        for heads, rows in self._chunks(others):
            features = self.features[heads, rows]
            chunk = self.like.new_zeros(len(self.found), *features.shape, others)
            for out, gradient in zip(chunk, self.found, strict=True):
                if gradient is not None:
                    gradient_rows(gradient, self.projection.side, features.flatten(), out.flatten(0, 1))
            self._add(heads, chunk.flatten(2), mean)
            del chunk
        if bias is not None:
            self._add(slice(None), bias, mean)

    def result(self) -> BlockScores:
        """The sums."""
        clamped, exceeded, zero = self.counts
        return BlockScores(
            self.scores, self.l1, self.live_l1, clamped, exceeded, zero, self.size, ~self.present
        )

    def _bias(self) -> Float[Tensor, "samples heads head_dim"]:
        """Gradients of the bias."""
        bias = self.like.new_zeros(len(self.found), *self.features.shape)
        for out, gradient in zip(bias, self.found, strict=True):
            if gradient is not None:
                gradient_bias(gradient, self.features.flatten(), out.flatten())
        return bias

    def _mean(self, bias: Tensor | None, entries: int) -> Tensor:
        """Mean of I over the block, which is taken before any chunk: 0 for a ridge that does without it."""
        if self.settings.ridge.kind != "relative":
            return self.like
        norms = torch.zeros(len(self.found), dtype=torch.float64, device=self.like.device)
        if bias is not None:
            norms += bias.flatten(1).square().sum(dim=1)
        for number, gradient in enumerate(self.found):
            if gradient is not None:
                norms[number] += squared_norm(
                    gradient, self.projection.side, self.features.flatten(), self.like
                )
        sums = norms[self.task_a].sum(), norms[self.task_b].sum()
        pooled = pooled_fisher(self.settings.fisher, sums[0], self.count_a, sums[1], self.count_b)
        return (pooled / entries).to(self.like)

    def _chunks(self, others: int) -> Iterator[tuple[slice, slice]]:
        """Several whole heads, or several rows of one head, at a time."""
        heads, head_dim = self.features.shape
        # gradients, what is made of task A's, and per entry I, its divisor, weight and masks
        row_bytes = (len(self.found) + self.count_a + 5) * others * self.like.element_size()
        limit = self.memory_bytes
        if self.like.device.type == "cpu":
            limit = min(limit, max(_CPU_CHUNK_BYTES, row_bytes))
        rows = limit // row_bytes
        if rows < 1:
            raise ValueError(
                f"memory_budget_mib is too small: one row of {self.projection.module!r} takes "
                f"{row_bytes / 2**20:.1f} MiB for {len(self.found)} samples, and half of the budget is "
                f"{self.memory_bytes / 2**20:.1f} MiB"
            )
        if rows >= head_dim:
            yield from ((part, slice(None)) for part in _parts(heads, rows // head_dim))
        else:
            yield from (
                (slice(head, head + 1), part) for head in range(heads) for part in _parts(head_dim, rows)
            )

    def _add(self, heads: slice, chunk: Float[Tensor, "samples heads entries"], mean: Tensor) -> None:
        """Add a chunk of some heads' entries to everything."""
        task_a, task_b = chunk[self.task_a], chunk[self.task_b]
        scratch = torch.empty_like(task_a)
        sum_a = torch.mul(task_a, task_a, out=scratch).sum(dim=0)
        sum_b = torch.zeros_like(sum_a) if self.settings.fisher == "a" else task_b.square().sum(dim=0)
        fisher = pooled_fisher(self.settings.fisher, sum_a, self.count_a, sum_b, self.count_b)
        divisor = self.settings.ridge.denominator(fisher, mean)
        part = {variant: total[heads] for variant, total in self.scores.items()}
        magnitudes = add_scores(
            part, chunk, self.task_a, self.task_b, weights(divisor.value, divisor.zero), scratch
        )
        self.l1[:, heads] += magnitudes.all_entries
        self.live_l1[:, heads] += magnitudes.live_entries
        self.counts[:, heads] += _counts(divisor)
        if heads.start in (0, None):
            self.size += fisher.shape[1]


def _counts(divisor: Denominator) -> Int64[Tensor, "3 heads"]:
    return torch.stack([mask.sum(dim=1) for mask in (divisor.clamped, divisor.exceeded, divisor.zero)])


def _slice(task: range, both: range) -> slice:
    return slice(task.start - both.start, task.stop - both.start)


def _parts(total: int, largest: int) -> Iterator[slice]:
    """Slices of nearly the same length, none longer than ``largest``."""
    count = -(-total // largest)
    step = -(-total // count)
    return (slice(first, min(first + step, total)) for first in range(0, total, step))
