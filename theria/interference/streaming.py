"""The scores of one block of one layer, a chunk of its parameters at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from theria.interference.fisher import Denominator, Ridge, pooled_fisher
from theria.interference.gradients import SampleGradients
from theria.interference.layout import Projection
from theria.interference.scores import PairSums, spans, weights
from theria.interference.store import Gradient, gradient_bias, gradient_rows, other_features, squared_norm


@dataclass(frozen=True)
class Settings:
    """What scores are asked for: the samples of both tasks in the store, variants, Fisher and ridge."""

    task_a: range
    task_b: range
    variants: Sequence[str]
    fisher: str
    ridge: Ridge


class Buffers:
    """Memory that one block after the other works in, since new pages cost more than what is done in them."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of that shape, of whatever content, in the memory that the name last had."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            # what is too small goes before its successor comes
            self._held.pop(name, None)
            self._held[name] = like.new_empty(size)
        return self._held[name][:size].view(*shape)


class BlockScores(NamedTuple):
    """Scores of one block of one layer and what its diagnostics are made of."""

    scores: Mapping[str, Float[Tensor, "heads a b"]]
    l1_a: Float[Tensor, "a heads"]
    l1_b: Float[Tensor, "b heads"]
    live_l1_b: Float[Tensor, "b heads"]
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
    buffers: Buffers,
) -> BlockScores:
    """Scores of the given features of a projection, weight and bias together.

    Samples without gradient are in no Fisher mean, and what stands in their rows and columns means nothing.
    """
    both = range(
        min(settings.task_a.start, settings.task_b.start), max(settings.task_a.stop, settings.task_b.stop)
    )
    found = [gradients.store[sample].get(projection.module) for sample in both]
    block = _Block(gradients, projection, features, settings, both, found, buffers)
    block.add(biased=projection.module in gradients.biased and projection.side == "output")
    return block.result()


class _Chunk(NamedTuple):
    """Gradients of some entries of some heads, and I of these entries."""

    gradients: Float[Tensor, "samples heads entries"]
    fisher: Float[Tensor, "heads entries"]


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
        buffers: Buffers,
    ) -> None:
        self.buffers = buffers
        self.projection, self.features, self.settings, self.found = projection, features, settings, found
        self.memory_bytes, self.scratch_bytes = gradients.memory_bytes, gradients.memory_bytes // 4
        self.like = torch.zeros((), dtype=gradients.dtype, device=gradients.device)
        self.task_a = _slice(settings.task_a, both)
        self.task_b = _slice(settings.task_b, both)
        # samples whose squares the Fisher information is made of
        self.squared_a = range(self.task_a.start, self.task_a.stop)
        self.squared_b = range(0) if settings.fisher == "a" else range(self.task_b.start, self.task_b.stop)
        self.present = torch.tensor([gradient is not None for gradient in found])
        self.count_a = int(self.present[self.task_a].sum())
        self.count_b = int(self.present[self.task_b].sum())
        heads = len(features)
        self.sums = PairSums(settings.variants, len(settings.task_a), len(settings.task_b), heads, self.like)
        self.counts = torch.zeros(3, heads, dtype=torch.int64, device=gradients.device)
        self.size = 0

    def add(self, *, biased: bool) -> None:
        """Add the entries of the weight, chunk by chunk, and of the bias where it belongs to the block."""
        present = [gradient for gradient in self.found if gradient is not None]
        if not present:
            return
        side = self.projection.side
        others = other_features(present[0], side)
        of_bias = partial(gradient_bias, features=self.features)
        bias = self._form("bias", (*self.features.shape, 1), of_bias) if biased else None
        entries = self.features.numel() * (others + biased)
        chunks, mean = [*self._chunks(others)], self.like
        for number, (heads, rows) in enumerate(chunks):
            features = self.features[heads, rows]
            write = partial(gradient_rows, side=side, features=features)
            chunk = self._form("weight", (*features.shape, others), write)
            if number == 0:
                mean = self._mean(self._total if len(chunks) > 1 else chunk.fisher.sum, bias, entries)
            self._add(heads, chunk, mean)
        if bias is not None:
            self._add(slice(None), bias, mean)

    def result(self) -> BlockScores:
        """The sums."""
        clamped, exceeded, zero = self.counts
        sums = self.sums
        return BlockScores(
            sums.scores,
            sums.l1_a,
            sums.l1_b,
            sums.live_l1_b,
            clamped,
            exceeded,
            zero,
            self.size,
            ~self.present,
        )

    def _form(self, name: str, shape: Sequence[int], write: Callable[..., None]) -> _Chunk:
        """Gradients of entries of shape (heads, rows, others), in the buffer of that name, and their I."""
        gradients = self.buffers.take(name, (len(self.found), *shape), self.like)
        sum_a, sum_b = self.like.new_zeros(2, *shape)
        for number, (out, gradient) in enumerate(zip(gradients, self.found, strict=True)):
            # whatever stands in the rows of a sample without gradient, its scores are not read
            if gradient is None:
                continue
            write(gradient, out=out.flatten(0, 1))
            # here, because what was just written is still in the processor's cache
            if number in self.squared_a:
                sum_a.addcmul_(out, out)
            if number in self.squared_b:
                sum_b.addcmul_(out, out)
        fisher = pooled_fisher(self.settings.fisher, sum_a, self.count_a, sum_b, self.count_b)
        return _Chunk(gradients.flatten(2), fisher.flatten(1))

    def _mean(self, total: Callable[[], Tensor], bias: _Chunk | None, entries: int) -> Tensor:
        """Mean of I over the block, given what sums that of the weight: 0 for a ridge that does without."""
        if self.settings.ridge.kind != "relative":
            return self.like
        found = total() if bias is None else total() + bias.fisher.sum()
        return (found / entries).to(self.like)

    def _total(self) -> Tensor:
        """Sum of I over the weight, before any chunk of it."""
        side, features = self.projection.side, self.features
        sum_a, sum_b = torch.zeros(2, dtype=torch.float64, device=self.like.device)
        for number, gradient in enumerate(self.found):
            if gradient is None or number not in {*self.squared_a, *self.squared_b}:
                continue
            norm = squared_norm(gradient, side, features, self.like)
            sum_a += norm if number in self.squared_a else 0
            sum_b += norm if number in self.squared_b else 0
        return pooled_fisher(self.settings.fisher, sum_a, self.count_a, sum_b, self.count_b)

    def _chunks(self, others: int) -> Iterator[tuple[slice, slice]]:
        """Several whole heads, or several rows of one head, at a time."""
        heads, head_dim = self.features.shape
        # gradients, and per entry sums, I, its divisor, weight and masks
        row_bytes = (len(self.found) + 7) * others * self.like.element_size()
        rows = (self.memory_bytes - self.scratch_bytes) // row_bytes
        if rows < 1:
            raise ValueError(
                f"memory_budget_mib is too small: one row of {self.projection.module!r} takes "
                f"{row_bytes / 2**20:.1f} MiB for {len(self.found)} samples, and three eighths of the budget "
                f"are {(self.memory_bytes - self.scratch_bytes) / 2**20:.1f} MiB"
            )
        yield from spans(heads, head_dim, rows)

    def _add(self, heads: slice, chunk: _Chunk, mean: Tensor) -> None:
        """Add a chunk of some heads' entries to everything."""
        divisor = self.settings.ridge.denominator(chunk.fisher, mean)
        weight = weights(divisor.value, divisor.zero)
        task_a, task_b = chunk.gradients[self.task_a], chunk.gradients[self.task_b]
        self.sums.add(heads, task_a, task_b, weight, self.scratch_bytes)
        self.counts[:, heads] += _counts(divisor)
        if heads.start in (0, None):
            self.size += chunk.fisher.shape[1]


def _counts(divisor: Denominator) -> Int64[Tensor, "3 heads"]:
    return torch.stack([mask.sum(dim=1) for mask in (divisor.clamped, divisor.exceeded, divisor.zero)])


def _slice(task: range, both: range) -> slice:
    return slice(task.start - both.start, task.stop - both.start)
