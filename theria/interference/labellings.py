"""Relabelling samples: which of them stand for task A, and the mean score between the tasks each time."""

import itertools
import math

import numpy as np

_CHUNK = 4096


def labellings(count_a: int, count_b: int, permutations: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of 1 for task A and 0 for task B, [rows, samples]; the first row is the labels as they are.

    Every labelling once where there are no more than ``permutations``, otherwise the labels as they are and
    so many random permutations of them.
    """
    count = count_a + count_b
    observed = (np.arange(count) < count_a).astype(np.float64)
    if math.comb(count, count_a) > permutations:
        shuffled = generator.permuted(np.tile(observed, (permutations, 1)), axis=1)
        return np.concatenate((observed[None], shuffled))
    rows = np.zeros((math.comb(count, count_a), count))
    # the first combination is that of the first samples: the labels as they are
    for row, chosen in zip(rows, itertools.combinations(range(count), count_a), strict=True):
        row[list(chosen)] = 1
    return rows


def means_between(pairs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean of the scores of samples labelled A against those labelled B, [rows, cells].

    Args:
        pairs: scores of every sample against every sample, [samples, samples, cells]; NaN is left out.
        rows: labels, [rows, samples].
    """
    return weighted_means(pairs, rows, 1 - rows)


def weighted_means(scores: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """sum_ij l_i M_ij r_j / sum_ij l_i r_j over the pairs that have a score, [rows, cells].

    Args:
        scores: M, [first samples, second samples, cells].
        left, right: weights l and r, [rows, first samples] and [rows, second samples].

    Returns:
        NaN where all pairs that count are without a score.
    """
    means = np.empty((len(left), scores.shape[2]))
    for cell in range(scores.shape[2]):
        values = scores[:, :, cell].astype(np.float64)
        present = np.isfinite(values)
        values = np.where(present, values, 0)
        for first in range(0, len(left), _CHUNK):
            part = slice(first, first + _CHUNK)
            of, by = left[part], right[part]
            total = ((of @ values) * by).sum(axis=1)
            if present.all():
                counted = of.sum(axis=1) * by.sum(axis=1)
            else:
                counted = ((of @ present.astype(np.float64)) * by).sum(axis=1)
            means[part, cell] = np.divide(total, counted, out=np.full(len(of), np.nan), where=counted > 0)
    return means
