"""The scores of all pairs of samples, from their gradients: matrix products over tiles of entries."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from theria.interference.fisher import Ridge, as_ridge

VARIANTS = ("directional", "signed", "symmetric")

_CPU_TILE = 2**20
"""Numbers made of one tile of gradients: what was just computed is multiplied while it is in the cache."""


def score_matrices(
    gradients_a: Tensor,
    gradients_b: Tensor,
    fisher: Tensor,
    *,
    variants: Sequence[str] = VARIANTS,
    ridge: Ridge | float | int = Ridge(),  # noqa: B008 (immutable)
) -> dict[str, Tensor]:
    r"""Scores of every pair of samples in every head, from given gradients of one tensor.

        directional  M_ij = sum_k g_ik^2 |g_jk| / I_k
        signed       M_ij = sum_k g_ik g_jk / I_k
        symmetric    M_ij = sum_k |g_ik| |g_jk| / I_k

    k runs over the entries of a head's slice and I_k is what ``ridge`` makes of the Fisher information. An
    entry with I = 0 contributes 0.

    Args:
        gradients_a: (samples of A, heads, entries).
        gradients_b: (samples of B, heads, entries).
        fisher: (heads, entries), the Fisher information I without ridge.
        variants: which of the above.
        ridge: see `Ridge`; a number is an absolute one.

    Returns:
        (heads, samples of A, samples of B) by variant.

    Raises:
        ValueError: for shapes or dtypes that do not fit one another, half precision, or an unknown variant.
    """
    check_variants(variants)
    shapes = tuple(gradients_a.shape), tuple(gradients_b.shape), tuple(fisher.shape)
    if fisher.ndim != 2 or any(len(s) != 3 or s[1:] != shapes[2] for s in shapes[:2]):
        raise ValueError(
            "expected gradients (samples, heads, entries) of both tasks and a Fisher information "
            f"(heads, entries), received {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    dtypes = {gradients_a.dtype, gradients_b.dtype, fisher.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(f"gradients and Fisher must all be float32, or all float64, received {dtypes}")
    divisor = as_ridge(ridge).denominator(fisher, fisher.mean())
    sums = PairSums(variants, shapes[0][0], shapes[1][0], shapes[2][0], fisher, of_samples=False)
    sums.add(slice(None), gradients_a, gradients_b, weights(divisor.value, divisor.zero))
    return sums.scores


def check_variants(variants: Sequence[str]) -> None:
    """Raise ValueError unless the variants are known and there is at least one."""
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or not variants:
        raise ValueError(f"variants must be among {', '.join(VARIANTS)}, received {tuple(variants)!r}")


def weights(denominator: Float[Tensor, "*entries"], zero: Tensor) -> Float[Tensor, "*entries"]:
    """1 / I with its ridge, 0 where I is 0."""
    return torch.where(zero, 0.0, 1 / denominator)


def spans(heads: int, entries: int, largest: int) -> Iterator[tuple[slice, slice]]:
    """Several whole heads, or several entries of one head, at a time: ``largest`` entries at most."""
    if largest >= entries:
        yield from ((part, slice(None)) for part in _parts(heads, largest // entries))
    else:
        yield from (
            (slice(head, head + 1), part) for head in range(heads) for part in _parts(entries, largest)
        )


def _parts(total: int, largest: int) -> Iterator[slice]:
    """Slices of nearly the same length, none longer than ``largest``."""
    count = -(-total // largest)
    step = -(-total // count)
    return (slice(first, min(first + step, total)) for first in range(0, total, step))


class PairSums:
    """Sums over entries: the scores of every pair, and |g|_1 of every sample.

    Args:
        variants: to sum.
        count_a, count_b, heads: numbers of samples and heads.
        like: gives dtype and device.
        of_samples: whether to sum |g| as well.

    Attributes:
        scores: (heads, samples of A, samples of B) by variant.
        l1_a, l1_b: |g|_1, (samples, heads); zeros where it is not summed.
        live_l1_b: the same over entries whose I is not 0.
    """

    def __init__(
        self,
        variants: Sequence[str],
        count_a: int,
        count_b: int,
        heads: int,
        like: Tensor,
        *,
        of_samples: bool = True,
    ) -> None:
        self._of_samples = of_samples
        # both of these meet |g_j|, so that one product with twice the rows gives both
        self._with_magnitudes = [v for v in ("directional", "symmetric") if v in variants]
        kinds = len(self._with_magnitudes)
        self._magnitudes = like.new_zeros(heads, kinds * count_a, count_b)
        parts = self._magnitudes.view(heads, kinds, count_a, count_b).unbind(1)
        found = dict(zip(self._with_magnitudes, parts, strict=True))
        if "signed" in variants:
            found["signed"] = like.new_zeros(heads, count_a, count_b)
        self.scores = {variant: found[variant] for variant in variants}
        self.l1_a, self.l1_b, self.live_l1_b = (like.new_zeros(n, heads) for n in (count_a, count_b, count_b))

    def add(
        self,
        heads: slice,
        gradients_a: Float[Tensor, "a heads entries"],
        gradients_b: Float[Tensor, "b heads entries"],
        weight: Float[Tensor, "heads entries"],
        scratch_bytes: int = 2**28,
    ) -> None:
        """Add what some entries of some heads contribute.

        Args:
            heads: which they are.
            gradients_a, gradients_b: of the tasks. They may share samples in memory.
            weight: of the entries, 1 / I, or 0 where I is 0.
            scratch_bytes: of what is made of gradients, at most.
        """
        limit = scratch_bytes // weight.element_size()
        if weight.device.type == "cpu":
            limit = min(limit, _CPU_TILE)
        count_a, count_b = len(gradients_a), len(gradients_b)
        # what meets |g_j|, g_i / I, and |g_j|
        each = (len(self._with_magnitudes) * count_a, count_a, count_b)
        largest = min(max(limit // max(sum(each), 1), 1), weight.numel())
        held = [weight.new_empty(rows * largest) for rows in each]
        chosen = range(self.l1_a.shape[1])[heads]
        for some, entries in spans(weight.shape[0], weight.shape[1], largest):
            of = slice(chosen[some][0], chosen[some][-1] + 1)
            w = weight[some, entries]
            scratch = [
                part[: rows * w.numel()].view(rows, *w.shape) for part, rows in zip(held, each, strict=True)
            ]
            self._add_tile(of, gradients_a[:, some, entries], gradients_b[:, some, entries], w, scratch)

    def _add_tile(
        self, heads: slice, a: Tensor, b: Tensor, weight: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        """Add a tile, in memory for what meets |g_j|, for g_i / I and for |g_j|."""
        rows, scaled, size_b = scratch
        torch.abs(b, out=size_b)
        if self._of_samples:
            l1_b, dead = size_b.sum(dim=-1), weight == 0
            self.l1_a[:, heads] += torch.abs(a, out=scaled).sum(dim=-1)
            self.l1_b[:, heads] += l1_b
            self.live_l1_b[:, heads] += torch.where(dead, 0, size_b).sum(dim=-1) if dead.any() else l1_b
        torch.mul(a, weight, out=scaled)
        if "signed" in self.scores:
            _add_products(self.scores["signed"][heads], scaled, b)
        if not self._with_magnitudes:
            return
        # directional above symmetric
        if "symmetric" in self.scores:
            torch.abs(scaled, out=rows[-len(a) :])
        if "directional" in self.scores:
            torch.mul(scaled, a, out=rows[: len(a)])
        _add_products(self._magnitudes[heads], rows, size_b)


def _add_products(
    total: Float[Tensor, "heads a b"],
    left: Float[Tensor, "a heads entries"],
    right: Float[Tensor, "b heads entries"],
) -> None:
    total.baddbmm_(left.transpose(0, 1), right.permute(1, 2, 0))
