"""The study's statistics: paired differences, agreement of FO and FO_STRICT, and correlation with the signal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from experiments.operator_sensitivity.fit import half_width
from experiments.operator_sensitivity.ledger import OK, Ledger
from experiments.operator_sensitivity.runs import CELL, PAIRED

CONFIDENCE = 0.95
ENOUGH_SEEDS = 8
"""Fewest pairs from which the study draws a claim."""

NO_DIFFERENCE = "no difference detected"
_STRICT_RTOL, _STRICT_ATOL = 1e-4, 1e-6


@dataclass(frozen=True)
class Interval:
    """A mean over pairs with its t-interval; NaN bounds for fewer than two pairs."""

    mean: float
    low: float
    high: float
    count: int
    p_value: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def paired_interval(differences: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Mean of differences within pairs, its 95% t-interval, and the p-value of the t-test against zero."""
    values = np.asarray(differences, dtype=float)
    mean = float(values.mean()) if len(values) else math.nan
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan, len(values), math.nan)
    half = half_width(values, CONFIDENCE)
    if half == 0:
        return Interval(mean, mean, mean, len(values), 1.0 if mean == 0 else 0.0)
    p_value = float(stats.ttest_1samp(values, 0.0).pvalue)
    return Interval(mean, mean - half, mean + half, len(values), p_value)


def successful(table: pd.DataFrame) -> pd.DataFrame:
    """Rows with figures."""
    return table[table["status"] == OK]


def pairs(table: pd.DataFrame, first: str = "FULL", second: str = "FO") -> pd.DataFrame:
    """Runs of two modes side by side that share everything else: parameters, tasks, configuration.

    Returns:
        The shared columns, ``gain``, the accuracy of the first minus that of the second, and the columns of
        the first run with its figures.
    """
    good = successful(table)
    ours, theirs = (good[good["mode"] == mode] for mode in (first, second))
    joined = ours.merge(theirs[[*PAIRED, "final_acc", "final_loss"]], on=list(PAIRED), suffixes=("", "_other"))
    return joined.assign(gain=joined["final_acc"] - joined["final_acc_other"])


def gains(table: pd.DataFrame, first: str = "FULL", second: str = "FO") -> pd.DataFrame:
    """Paired accuracy gain of one mode over another by configuration, over the seeds.

    The p-values are adjusted over the table by Benjamini and Hochberg. A difference is stated where the
    interval excludes zero and the adjusted p-value is below 0.05; with fewer than eight pairs it is called
    provisional.

    Returns:
        Columns of the configuration, gain, low, high, pairs, p_value, p_adjusted, statement.
    """
    rows: list[dict[str, object]] = []
    for cell, own in pairs(table, first, second).groupby(list(CELL), sort=False):
        found = paired_interval(own["gain"].to_numpy())
        rows.append(
            dict(zip(CELL, cell, strict=True))
            | {"gain": found.mean, "low": found.low, "high": found.high, "pairs": found.count}
            | {"p_value": found.p_value}
        )
    result = pd.DataFrame(rows, columns=[*CELL, "gain", "low", "high", "pairs", "p_value"])
    result["p_adjusted"] = _adjusted(result["p_value"].to_numpy(dtype=float))
    result["statement"] = [_statement(row, first, second) for _, row in result.iterrows()]
    return result


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every configuration and mode, with the half-width of the 95% interval over seeds."""
    rows: list[dict[str, object]] = []
    for cell, own in successful(table).groupby([*CELL, "mode"], sort=False):
        norms = own[[f"attn_grad_norm_{letter}" for letter in "qkv"]].to_numpy(dtype=float)
        norm = np.linalg.norm(norms, axis=1)
        accuracy = own["final_acc"].to_numpy(dtype=float)
        rows.append(
            dict(zip([*CELL, "mode"], cell, strict=True))
            | {"seeds": len(own), "final_acc": accuracy.mean(), "final_acc_ci95": half_width(accuracy)}
            | {"attn_grad_norm": norm.mean(), "attn_grad_norm_ci95": half_width(norm)}
            | {
                name: own[name].mean()
                for name in ("final_loss", "rel_diff_full_vs_fo", "attn_rel_diff", "attn_second_order_path")
            }
            | {
                name: bool(own[name].map(as_bool).all())
                for name in ("attn_grad_present", "attn_second_order_ok")
            }
            | {"mean_outer_step_time_s": own["mean_outer_step_time_s"].mean()}
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class StrictAgreement:
    """How far FO and FO_STRICT are apart, which in exact arithmetic they are not.

    Attributes:
        compared: pairs of runs.
        steps: outer steps compared.
        largest: largest difference of the query loss at any step of any pair, relative to it.
        disagreeing: descriptions of the pairs that are beyond the tolerance.
    """

    compared: int
    steps: int
    largest: float
    disagreeing: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether something was compared and all of it agrees."""
        return self.compared > 0 and not self.disagreeing


def strict_agreement(table: pd.DataFrame, ledger: Ledger) -> StrictAgreement:
    """Compare FO with FO_STRICT at every outer step: query loss, accuracy and gradient norms.

    Two values agree within 1e-4 of themselves plus 1e-6, some thousand roundings of float32.
    """
    good = successful(table)
    first, strict = (good[good["mode"] == mode] for mode in ("FO", "FO_STRICT"))
    compared, steps, largest, disagreeing = 0, 0, 0.0, []
    joined = first.merge(strict[[*PAIRED, "run_id"]], on=list(PAIRED), suffixes=("", "_strict"))
    for _, row in joined.iterrows():
        one, other = ledger.curves(row["run_id"]), ledger.curves(row["run_id_strict"])
        if one is None or other is None:
            continue
        compared += 1
        steps += len(one["loss"])
        largest = max(largest, float(np.max(np.abs(one["loss"] - other["loss"]) / np.abs(one["loss"]))))
        apart = [
            name
            for name, values in one.items()
            if not np.allclose(values, other[name], rtol=_STRICT_RTOL, atol=_STRICT_ATOL)
        ]
        if apart:
            label = f"{row['backend']} {row['variant']} k={row['inner_steps']} seed {row['seed']}"
            disagreeing.append(f"{label} ({', '.join(apart)})")
    return StrictAgreement(compared, steps, largest, tuple(disagreeing))


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

    Points of one seed share tasks and parameters, so whole seeds are resampled (10000 percentile
    bootstraps); with fewer than three seeds there is no interval.

    Args:
        paired: see `pairs`.
        signal: the column.
    """
    known = paired.dropna(subset=[signal, "gain"])
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
            n_resamples=10_000,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return Correlation(whole, low, high, len(known), count)


def as_bool(value: object) -> bool:
    """A truth value as a CSV brings it back."""
    return str(value) == "True"


def _adjusted(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = ~np.isnan(p_values)
    result = np.full_like(p_values, math.nan)
    if known.any():
        result[known] = stats.false_discovery_control(p_values[known])
    return result


def _statement(row: pd.Series, first: str, second: str) -> str:
    if row["pairs"] < 2:
        return "one pair, no interval"
    interval = Interval(row["gain"], row["low"], row["high"], row["pairs"], row["p_value"])
    if not interval.excludes_zero or not row["p_adjusted"] < 1 - CONFIDENCE:
        return NO_DIFFERENCE
    said = f"{first if row['gain'] > 0 else second} higher"
    return said if row["pairs"] >= ENOUGH_SEEDS else f"{said} (provisional, {row['pairs']} seeds)"
