"""Means over seeds, and differences within pairs of runs that share tasks and parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from experiments.operator_sensitivity.columns import OK
from experiments.operator_sensitivity.fit import half_width
from experiments.operator_sensitivity.runs import BASELINE, CELL, PAIRED

CONFIDENCE = 0.95
ENOUGH_SEEDS = 8
"""Fewest pairs from which the study draws a claim."""

NO_DIFFERENCE = "no difference detected"


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


def rounded(differences: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Differences of accuracies to twelve places, so that those that are equal are so in float64 too.

    Accuracies are shares of some thousand sequences: what is smaller is rounding of their means.
    """
    return np.round(np.asarray(differences, dtype=float), 12)


def paired_interval(differences: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Mean of differences within pairs, its 95% t-interval, and the p-value of the t-test against zero."""
    values = rounded(differences)
    mean = float(values.mean()) if len(values) else math.nan
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan, len(values), math.nan)
    half = half_width(values, CONFIDENCE)
    if half == 0:
        return Interval(mean, mean, mean, len(values), 1.0 if mean == 0 else 0.0)
    p_value = float(2 * stats.t.sf(abs(mean) / stats.sem(values), len(values) - 1))
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
    joined = ours.merge(
        theirs[[*PAIRED, "final_acc", "final_loss"]], on=list(PAIRED), suffixes=("", "_other")
    )
    return joined.assign(gain=joined["final_acc"] - joined["final_acc_other"])


def gains(table: pd.DataFrame, first: str = "FULL", second: str = "FO") -> pd.DataFrame:
    """Paired accuracy gain of one mode over another by configuration, over the seeds.

    The p-values are adjusted over the table by Benjamini and Hochberg. A difference is stated where the
    interval excludes zero and the adjusted p-value is below 0.05; with fewer than eight pairs it is called
    provisional.

    Returns:
        Columns of the configuration, gain, low, high, pairs, p_value, p_adjusted, statement.
    """
    return _intervals(pairs(table, first, second), list(CELL), first, second)


def against_baseline(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every variant minus that of unharmed attention, paired by everything else.

    Returns:
        backend, device, variant, mode, inner_steps, gain, low, high, pairs, p_value, p_adjusted, statement.
    """
    good = successful(table)
    shared = [name for name in (*PAIRED, "mode") if name != "variant"]
    sound = good.loc[good["variant"] == BASELINE, [*shared, "final_acc"]]
    joined = good[good["variant"] != BASELINE].merge(sound, on=shared, suffixes=("", "_sound"))
    joined["gain"] = joined["final_acc"] - joined["final_acc_sound"]
    return _intervals(joined, ["backend", "device", "variant", "mode", "inner_steps"], "variant", BASELINE)


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


def as_bool(value: object) -> bool:
    """A truth value as a CSV brings it back."""
    return str(value) == "True"


def _intervals(paired: pd.DataFrame, names: list[str], first: str, second: str) -> pd.DataFrame:
    """The mean gain of every cell of ``names`` with its interval, and what it says of first over second."""
    rows: list[dict[str, object]] = []
    for cell, own in paired.groupby(names, sort=False):
        found = paired_interval(own["gain"].to_numpy())
        rows.append(
            dict(zip(names, cell, strict=True))
            | {"gain": found.mean, "low": found.low, "high": found.high, "pairs": found.count}
            | {"p_value": found.p_value}
        )
    result = pd.DataFrame(rows, columns=[*names, "gain", "low", "high", "pairs", "p_value"])
    result["p_adjusted"] = _adjusted(result["p_value"].to_numpy(dtype=float))
    result["statement"] = _statements(result, first, second)
    return result


def _adjusted(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = ~np.isnan(p_values)
    result = np.full_like(p_values, math.nan)
    if known.any():
        result[known] = stats.false_discovery_control(p_values[known])
    return result


def _statements(rows: pd.DataFrame, first: str, second: str) -> pd.Series:
    return pd.Series([_statement(row, first, second) for _, row in rows.iterrows()], dtype=str)


def _statement(row: pd.Series, first: str, second: str) -> str:
    if row["pairs"] < 2:
        return "one pair, no interval"
    interval = Interval(row["gain"], row["low"], row["high"], row["pairs"], row["p_value"])
    if not interval.excludes_zero or not row["p_adjusted"] < 1 - CONFIDENCE:
        return NO_DIFFERENCE
    said = f"{first if row['gain'] > 0 else second} higher"
    return said if row["pairs"] >= ENOUGH_SEEDS else f"{said} (provisional, {row['pairs']} seeds)"
