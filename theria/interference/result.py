"""What a computation of scores returns."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from theria.interference.fisher import Ridge

Head = int | str


class Conflict(NamedTuple):
    """One pair of samples in one head; a list of them makes a ``pandas.DataFrame`` as it is."""

    sample_i: Hashable
    sample_j: Hashable
    layer: int
    head: Head
    score: float


@dataclass(frozen=True)
class BlockDiagnostics:
    """What stands behind the scores of one block; L layers, H heads.

    Attributes:
        gradient_l1_a, gradient_l1_b: |g_i|_1 and |g_j|_1 over a slice, [nA, L, H] and [nB, L, H].
        live_l1_b: the same of B over entries with I > 0 alone, which mean_i M_ij equals for the directional
            score with task A's Fisher and no ridge.
        slice_size: entries of a slice, [L, H]; 0, and the shares NaN, where no sample has a gradient.
        ridge_share: share of a slice's entries to which the ridge adds more than I holds, [L, H].
        clamped_share: share that lies below the ridge's threshold, [L, H]; 0 for a relative ridge.
        zero_share: share with I = 0, which contribute nothing, [L, H].
        negative_share: share of signed scores below 0 among pairs with gradients, [L, H]; None without them.
    """

    gradient_l1_a: np.ndarray
    gradient_l1_b: np.ndarray
    live_l1_b: np.ndarray
    slice_size: np.ndarray
    ridge_share: np.ndarray
    clamped_share: np.ndarray
    zero_share: np.ndarray
    negative_share: np.ndarray | None


@dataclass(frozen=True)
class InterferenceResult:
    """Scores of every sample of task A against every sample of task B in every head.

    Attributes:
        scores: arrays [nA, nB, layers, heads] by variant and block; NaN where a gradient is missing.
        ids_a, ids_b: of the samples, as given.
        layers: numbers of the layers on the third axis, counted as the layout lists them.
        layer_names: their modules.
        heads: by block, the heads on the last axis: query heads in Q and O, key-value heads in K and V, or
            ("all",) for scores of whole blocks.
        missing_a, missing_b: by block, whether a sample has no gradient in a layer that is finite and can be
            squared, [n, layers].
        tokens_a, tokens_b: tokens of each sample at which the loss reaches a projection.
        fisher, ridge: of the computation.
        diagnostics: by block.
    """

    scores: Mapping[str, Mapping[str, np.ndarray]]
    ids_a: tuple[Hashable, ...]
    ids_b: tuple[Hashable, ...]
    layers: tuple[int, ...]
    layer_names: tuple[str, ...]
    heads: Mapping[str, tuple[Head, ...]]
    missing_a: Mapping[str, np.ndarray]
    missing_b: Mapping[str, np.ndarray]
    tokens_a: np.ndarray
    tokens_b: np.ndarray
    fisher: str
    ridge: Ridge
    diagnostics: Mapping[str, BlockDiagnostics]

    @property
    def variants(self) -> tuple[str, ...]:
        """Variants that were computed."""
        return tuple(self.scores)

    @property
    def blocks(self) -> str:
        """Blocks that were computed, in the order Q, K, V, O."""
        return "".join(self.heads)

    def missing(self, block: str) -> np.ndarray:
        """Pairs without a score, [nA, nB, layers]: a gradient of either sample is missing."""
        return self.missing_a[block][:, None] | self.missing_b[block][None, :]

    def normalised(self, variant: str, block: str) -> np.ndarray:
        """M_ij / |g_j|_1, [nA, nB, layers, heads]; NaN where g_j is 0.

        Under task A's Fisher without a ridge the mean over i of the directional M_ij is |g_j|_1 whatever task
        A is, so that means of M rank heads by the size of B's gradients; of this one they are 1.
        """
        size = self.diagnostics[block].gradient_l1_b
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.scores[variant][block] / np.where(size == 0, np.nan, size)

    def layer_head_avg(self, variant: str, block: str, *, normalised: bool = False) -> np.ndarray:
        """Mean over the pairs that have a score, [layers, heads]; 0 without samples, NaN without scores."""
        values = self.normalised(variant, block) if normalised else self.scores[variant][block]
        if not values.shape[0] or not values.shape[1]:
            return np.zeros(values.shape[2:], dtype=values.dtype)
        counted = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            return np.where(counted, values, 0).sum(axis=(0, 1)) / counted.sum(axis=(0, 1))

    def top_conflicts(self, variant: str, block: str, k: int) -> list[Conflict]:
        """The k strongest conflicts, strongest first; fewer where there are fewer.

        Strongest are the largest scores, and for the signed variant the most negative: only scores below 0
        are conflicts there, and only scores above 0 elsewhere. Pairs without a score are left out, equal
        scores stand in the order of samples, layers and heads.

        Raises:
            ValueError: for a negative k.
        """
        if k < 0:
            raise ValueError(f"k must be at least 0, received {k}")
        scores = self.scores[variant][block]
        strength = (-scores if variant == "signed" else scores).ravel()
        # NaN compares as not above 0
        conflicts = np.flatnonzero(strength > 0)
        ranked = conflicts[np.argsort(-strength[conflicts], kind="stable")[:k]]
        found = zip(*np.unravel_index(ranked, scores.shape), strict=True)
        return [
            Conflict(
                self.ids_a[i],
                self.ids_b[j],
                self.layers[layer],
                self.heads[block][h],
                float(scores[i, j, layer, h]),
            )
            for i, j, layer, h in found
        ]
