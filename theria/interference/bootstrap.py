"""Intervals of mean scores, by drawing samples anew."""

import numpy as np

from theria.interference.labellings import weighted_means


def bootstrap_intervals(
    scores: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of the mean score over pairs, [layers, heads] each.

    Samples of both tasks are drawn anew, each task by itself, and the pairs between them taken together (the
    pigeonhole bootstrap, Owen, Ann. Appl. Stat. 1(2), 2007), since pairs that share a sample are not
    independent. The Fisher information is taken as given.

    Args:
        scores: of one variant and block, [nA, nB, layers, heads]; NaN is left out.
        confidence: of the intervals.
        resamples: number of draws.
        seed: of the draws.

    Raises:
        ValueError: for a task without samples, a confidence outside (0, 1) or no resamples.
    """
    count_a, count_b = scores.shape[:2]
    if not count_a or not count_b or not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            "bootstrap_intervals needs samples of both tasks, confidence in (0, 1) and resamples of at least "
            f"1, received {count_a} and {count_b} samples, {confidence} and {resamples}"
        )
    generator = np.random.default_rng(seed)
    left, right = (
        generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        for n in (count_a, count_b)
    )
    means = weighted_means(scores.reshape(count_a, count_b, -1), left, right)
    found = np.full((2, means.shape[1]), np.nan)
    known = np.isfinite(means).any(axis=0)
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    found[:, known] = np.nanquantile(means[:, known], tails, axis=0)
    low, high = found.reshape(2, *scores.shape[2:])
    return low, high
