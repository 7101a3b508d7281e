"""Whether accuracy gain goes with the operator's second-order signal."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from experiments.operator_sensitivity.statistics import CONFIDENCE, rounded


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of accuracy gain and signal, with a bootstrap interval over seeds."""

    coefficient: float
    low: float
    high: float
    points: int
    seeds: int


def correlation(paired: pd.DataFrame, signal: str = "attn_rel_diff") -> Correlation:
    """Spearman's correlation of the gain of FULL over FO with the operator's signal of the FULL run.

    Points of one seed share tasks and parameters, so whole seeds are resampled (2000 percentile
    bootstraps); with fewer than three seeds there is no interval.

    Args:
        paired: see `pairs`.
        signal: the column.
    """
    known = paired.dropna(subset=[signal, "gain"])
    # gains that are equal have to share a rank
    known = known.assign(gain=rounded(known["gain"].to_numpy()))
    by_seed = [own[[signal, "gain"]].to_numpy(dtype=float) for _, own in known.groupby("seed")]
    count = len(by_seed)

    def rank_correlation(chosen: NDArray[np.int64]) -> float:
        points = np.concatenate([by_seed[i] for i in chosen.astype(int)])
        if (points == points[0]).all(axis=0).any():
            return math.nan
        return float(stats.spearmanr(points[:, 0], points[:, 1]).statistic)

    whole = rank_correlation(np.arange(count)) if len(known) > 2 else math.nan
    low = high = math.nan
    if count >= 3 and not math.isnan(whole):
        found = stats.bootstrap(
            (np.arange(count),),
            rank_correlation,
            vectorized=False,
            n_resamples=2000,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return Correlation(whole, low, high, len(known), count)
