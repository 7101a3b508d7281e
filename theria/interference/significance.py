r"""Whether two tasks interfere in a head more than samples with their labels shuffled would.

Under the hypothesis that the labels A and B say nothing, samples are exchangeable: the mean score between the
tasks in a head, T = mean_{i in A, j in B} M_ij, is distributed as that over random relabellings of the same
samples. That asks for scores M of every sample against every sample which do not know the labels: the Fisher
information is the mean over all samples, (n_A I_A + n_B I_B) / (n_A + n_B). Neither task A's nor, where n_A
and n_B differ, the plain mean of both is invariant under relabelling.

What a test can find depends on the variant. The signed score asks whether samples of different tasks agree
less than samples at large do; that they oppose each other on the average is for the sign of T to say. The
directional and the symmetric one are made of magnitudes: they ask whether the tasks differ in how large their
gradients are and where, not whether they agree.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.stats import false_discovery_control

from theria.interference.compute import score
from theria.interference.fisher import Ridge
from theria.interference.gradients import SampleGradients
from theria.interference.labellings import labellings, means_between
from theria.interference.result import Head

ALTERNATIVES = ("less", "greater", "two-sided")
CORRECTIONS = ("bh", "by", "max_t")
_LEAST_PERMUTATIONS = 1999
_ROUNDING = 1e-12
"""Means that differ by less, in units of the mean magnitude of scores, are the same; more in float32."""


class TooFewSamplesError(ValueError):
    """So few samples have too few labellings for any head to be significant."""


class Finding(NamedTuple):
    """One head: T, its distance from relabelled samples in their standard deviations, its p-values."""

    block: str
    layer: int
    head: Head
    mean: float
    effect: float
    p_value: float
    adjusted: float
    significant: bool


@dataclass(frozen=True)
class Significance:
    """Tests of every head, by block as arrays [layers, heads].

    Attributes:
        alternative, correction, level: of the tests.
        permutations: relabellings looked at, the labels as they are included.
        exact: whether these are all there are.
        layers, heads: numbers of the layers, and names of the heads by block.
        mean: T, the mean score between the tasks.
        effect: T less its mean over relabellings, in their standard deviations.
        p_values: of one head alone; NaN where it is not tested.
        adjusted: corrected for the number of heads; a head is significant where this is at most ``level``.
    """

    alternative: str
    correction: str
    level: float
    permutations: int
    exact: bool
    layers: tuple[int, ...]
    heads: Mapping[str, tuple[Head, ...]]
    mean: Mapping[str, np.ndarray]
    effect: Mapping[str, np.ndarray]
    p_values: Mapping[str, np.ndarray]
    adjusted: Mapping[str, np.ndarray]

    def significant(self, block: str) -> np.ndarray:
        """Which heads are, [layers, heads]."""
        return self.adjusted[block] <= self.level

    def ranked(self) -> list[Finding]:
        """All heads that were tested, the surest first: by adjusted p-value, then by distance."""
        found = [
            Finding(
                block,
                self.layers[layer],
                self.heads[block][head],
                float(self.mean[block][layer, head]),
                float(self.effect[block][layer, head]),
                float(p_value),
                float(self.adjusted[block][layer, head]),
                bool(self.significant(block)[layer, head]),
            )
            for block, p_values in self.p_values.items()
            for (layer, head), p_value in np.ndenumerate(p_values)
            if not math.isnan(p_value)
        ]
        return sorted(found, key=lambda finding: (finding.adjusted, finding.p_value, -abs(finding.effect)))


def significance(
    gradients: SampleGradients,
    task_a: range,
    task_b: range,
    *,
    variant: str = "signed",
    ridge: Ridge | float | int = Ridge(),  # noqa: B008 (immutable)
    heads: Sequence[int] | None = None,
    alternative: str | None = None,
    correction: str = "bh",
    level: float = 0.05,
    permutations: int | None = None,
    seed: int = 0,
) -> Significance:
    """Tests of every head of collected gradients, with the Fisher information of all samples together.

    Args:
        gradients: of `theria.interference.collect`, the samples of task A followed by those of task B.
        task_a, task_b: where they stand; task B begins where task A ends.
        variant, ridge, heads: of the scores, as in `theria.interference.compute`.
        alternative, correction, level, permutations, seed: as in `label_permutation`; the alternative is
            "less" for the signed score, whose conflicts are negative, and "two-sided" otherwise by default.

    Raises:
        ValueError: for ranges that do not follow one another, and what `label_permutation` refuses.
    """
    if task_a.stop != task_b.start:
        raise ValueError(f"task_b must begin where task_a ends, received {task_a} and {task_b}")
    pooled = range(task_a.start, task_b.stop)
    # samples of different tasks may bear the same id
    unnamed = replace(gradients, ids=tuple(range(len(gradients))))
    # over all samples against themselves, the mean over task A is the mean over all samples
    found = score(unnamed, pooled, pooled, variants=(variant,), fisher="a", ridge=ridge, heads=heads)
    return label_permutation(
        found.scores[variant],
        len(task_a),
        layers=found.layers,
        heads=found.heads,
        alternative=alternative or ("less" if variant == "signed" else "two-sided"),
        correction=correction,
        level=level,
        permutations=permutations,
        seed=seed,
    )


def label_permutation(
    pairs: Mapping[str, np.ndarray],
    count_a: int,
    *,
    layers: Sequence[int] | None = None,
    heads: Mapping[str, tuple[Head, ...]] | None = None,
    alternative: str = "less",
    correction: str = "bh",
    level: float = 0.05,
    permutations: int | None = None,
    seed: int = 0,
) -> Significance:
    """Permutation tests of given scores of every sample against every sample.

    P-values count the labels as they are among the relabellings and so are never 0 (Phipson & Smyth, Stat.
    Appl. Genet. Mol. Biol. 9, 2010); they agree with `scipy.stats.permutation_test`. A head is not tested
    (NaN) if so many samples have no gradient there that a task could be left without any.

    Args:
        pairs: by block, [samples, samples, layers, heads], task A's samples first on both axes.
        count_a: samples of task A.
        layers, heads: their names; numbers from 0 by default.
        alternative: "less", "greater" or "two-sided" than relabelled samples.
        correction: over all blocks, layers and heads: "bh" and "by" bound the share of false findings
            (Benjamini & Hochberg 1995; Benjamini & Yekutieli 2001, under any dependence), "max_t" the
            probability of any (Westfall & Young 1993, of the distances in standard deviations).
        level: that bound.
        permutations: random relabellings; None for twice as many as `permutations_needed`, or 1999. All
            there are, where they are fewer.
        seed: of the relabellings.

    Raises:
        ValueError: for arguments not among these, a task without samples, or too few permutations for the
            level; the message says how many it takes.
        TooFewSamplesError: for too few samples for any number of permutations; a ValueError too.
    """
    _check(alternative, correction, level)
    first = next(iter(pairs.values()))
    count, count_b = len(first), len(first) - count_a
    if count_a < 1 or count_b < 1:
        raise ValueError(f"both tasks need samples, received {count_a} of A and {count_b} of B")
    cells = {block: values.reshape(count, count, -1) for block, values in pairs.items()}
    together = np.concatenate(list(cells.values()), axis=2)
    tested = _tested(together, count_a)
    needed = permutations_needed(level, int(tested.sum()), correction=correction, alternative=alternative)
    chosen = _permutations(permutations, needed, together, count_a)
    rows = labellings(count_a, count_b, chosen, np.random.default_rng(seed))
    mean = means_between(together, rows[:1])[0]
    effect, p_values, adjusted = _judged(together, rows, tested, alternative, correction)
    split = np.cumsum([values.shape[2] for values in cells.values()])[:-1]

    def by_block(flat: np.ndarray) -> dict[str, np.ndarray]:
        parts = zip(pairs.items(), np.split(flat, split), strict=True)
        return {block: part.reshape(values.shape[2:]) for (block, values), part in parts}

    return Significance(
        alternative=alternative,
        correction=correction,
        level=level,
        permutations=len(rows),
        exact=math.comb(count, count_a) <= chosen,
        layers=tuple(range(first.shape[2])) if layers is None else tuple(layers),
        heads={b: tuple(range(v.shape[3])) for b, v in pairs.items()} if heads is None else heads,
        mean=by_block(mean),
        effect=by_block(effect),
        p_values=by_block(p_values),
        adjusted=by_block(adjusted),
    )


def permutations_needed(
    level: float, hypotheses: int, *, correction: str = "bh", alternative: str = "less"
) -> int:
    """Least number of random relabellings with which one head alone can be significant among so many.

    With R of them no p-value is below 1 / (R + 1), twice that for "two-sided". The largest p-value that BH
    takes for one finding among m is level / m, BY level / (m sum_k 1/k); max-T asks for level itself.
    """
    _check(alternative, correction, level)
    if correction == "max_t":
        return _ceiling(1 / level) - 1
    share = math.fsum(1 / k for k in range(1, hypotheses + 1)) if correction == "by" else 1.0
    sides = 2 if alternative == "two-sided" else 1
    return _ceiling(sides * max(hypotheses, 1) * max(share, 1) / level) - 1


def _check(alternative: str, correction: str, level: float) -> None:
    if alternative not in ALTERNATIVES:
        raise ValueError(f"alternative must be one of {', '.join(ALTERNATIVES)}, received {alternative!r}")
    if correction not in CORRECTIONS:
        raise ValueError(f"correction must be one of {', '.join(CORRECTIONS)}, received {correction!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, received {level}")


def _tested(together: np.ndarray, count_a: int) -> np.ndarray:
    """Cells in which every relabelling leaves both tasks a sample with a gradient."""
    missing = (~np.isfinite(together)).all(axis=1).sum(axis=0)
    return np.asarray(missing < min(count_a, len(together) - count_a))


def _permutations(given: int | None, needed: int, together: np.ndarray, count_a: int) -> int:
    """How many relabellings to draw; ValueError where they cannot reach the level."""
    count = len(together)
    distinct = math.comb(count, count_a)
    if 2 * count_a == count and _is_symmetric(together):
        distinct //= 2  # with both tasks exchanged the mean is the same
    if distinct < needed + 1:
        raise TooFewSamplesError(
            f"{count_a} and {count - count_a} samples have {distinct} distinct labellings, and one "
            f"significant head takes {needed + 1}: take more samples, fewer heads, a higher level or max_t"
        )
    if given is None:
        return max(_LEAST_PERMUTATIONS, 2 * needed)
    if given < needed:
        raise ValueError(f"{given} permutations cannot make one head significant: it takes {needed}")
    return given


def _is_symmetric(together: np.ndarray) -> bool:
    """Whether every cell's scores are the same with both samples exchanged, up to rounding errors."""
    magnitudes = np.where(np.isfinite(together), np.abs(together), 0).max(axis=(0, 1))
    differences = np.nan_to_num(np.abs(together - together.swapaxes(0, 1)))
    return bool((differences <= 1e-5 * magnitudes).all())


def _judged(
    together: np.ndarray, rows: np.ndarray, tested: np.ndarray, alternative: str, correction: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance, p-value and adjusted p-value of every cell; NaN where it is not tested."""
    effect, p_values, adjusted, slack = (np.full(len(tested), np.nan) for _ in range(4))
    if not tested.any():
        return effect, p_values, adjusted
    largest = np.full(len(rows), -np.inf)
    # one after the other: relabelled means of all cells may take far more memory than the scores
    for cell in np.flatnonzero(tested):
        scores = together[:, :, cell : cell + 1]
        means = means_between(scores, rows)[:, 0]
        rounding = _rounding(scores) * float(np.nanmean(np.abs(scores), dtype=np.float64))
        less = float((means <= means[0] + rounding).mean())
        greater = float((means >= means[0] - rounding).mean())
        both = min(2 * min(less, greater), 1.0)
        p_values[cell] = {"less": less, "greater": greater, "two-sided": both}[alternative]
        spread = float(means.std())
        distances = (means - means.mean()) / spread if spread > rounding else np.zeros(len(rows))
        effect[cell] = distances[0]
        slack[cell] = max(_ROUNDING, rounding / spread) if spread > rounding else _ROUNDING
        np.maximum(largest, _strength(distances, alternative), out=largest)
    if correction == "max_t":
        least = _strength(effect, alternative) - slack
        adjusted[tested] = [float((largest >= strength).mean()) for strength in least[tested]]
    else:
        adjusted[tested] = false_discovery_control(p_values[tested], method=correction)
    return effect, p_values, adjusted


def _strength(distances: np.ndarray, alternative: str) -> np.ndarray:
    """Distances as far as they speak for the alternative."""
    return {"less": -distances, "greater": distances, "two-sided": np.abs(distances)}[alternative]


def _rounding(scores: np.ndarray) -> float:
    """Rounding errors of means, in units of the mean magnitude of scores."""
    return max(_ROUNDING, 8 * float(np.finfo(scores.dtype).eps))


def _ceiling(value: float) -> int:
    # 1 / 0.05 is not exactly 20
    return math.ceil(round(value, 6))
