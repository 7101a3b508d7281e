"""Paired statistics against scipy and against what must come out."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.operator_sensitivity.correlation import correlation
from experiments.operator_sensitivity.ledger import Ledger
from experiments.operator_sensitivity.runs import Run
from experiments.operator_sensitivity.statistics import (
    NO_DIFFERENCE,
    against_baseline,
    cells,
    gains,
    paired_interval,
    pairs,
)
from experiments.operator_sensitivity.strictness import strict_agreement

NOISE = [0.01, -0.012, 0.004, -0.006, 0.002, 0.007, -0.009, 0.004]


def test_the_interval_is_the_paired_t_test():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=9), generator.normal(size=9)
    found, expected = paired_interval(one - other), stats.ttest_rel(one, other)
    bounds = expected.confidence_interval(0.95)
    assert found.low == pytest.approx(bounds.low)
    assert found.high == pytest.approx(bounds.high)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.count == 9


def test_the_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(1).normal(0.3, 1.0, size=(600, 8))
    covered = [(i := paired_interval(s)).low <= 0.3 <= i.high for s in samples]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize(("values", "mean"), [([], math.nan), ([0.2], 0.2)])
def test_fewer_than_two_pairs_have_no_interval(values, mean):
    found = paired_interval(values)
    assert found.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(found.low)
    assert not found.excludes_zero


def test_equal_differences_have_an_interval_of_no_width():
    assert paired_interval([0.0, 0.0]).p_value == 1.0
    assert paired_interval([0.5, 0.5]).excludes_zero


def test_pairing_sees_what_the_spread_of_seeds_would_hide(made):
    row = gains(made.table(made.pairs([0.02 + n / 10 for n in NOISE]))).iloc[0]
    assert row["gain"] == pytest.approx(0.02)
    assert 0 < row["low"] < 0.02 < row["high"]
    assert row["statement"] == "FULL higher"
    assert row["pairs"] == 8


def test_no_difference_is_said_plainly(made):
    assert gains(made.table(made.pairs(NOISE))).iloc[0]["statement"] == NO_DIFFERENCE


def test_first_order_may_win(made):
    assert gains(made.table(made.pairs([n / 10 - 0.05 for n in NOISE]))).iloc[0]["statement"] == "FO higher"


def test_few_seeds_are_provisional(made):
    said = gains(made.table(made.pairs([0.1, 0.1001, 0.0999]))).iloc[0]["statement"]
    assert said == "FULL higher (provisional, 3 seeds)"


def test_runs_without_a_partner_or_figures_do_not_count(made):
    rows = made.pairs([0.1, 0.2])
    rows.append(made.row(dataclasses.replace(made.TINY, seed=7, mode="FULL"), 0.9))
    rows.append(made.row(dataclasses.replace(made.TINY, seed=1, mode="FO", inner_lr=0.3), 0.9))
    rows[0] |= {"status": "NON_FINITE"}
    found = pairs(made.table(rows))
    assert found["gain"].tolist() == pytest.approx([0.2])


def test_p_values_are_adjusted_over_the_table(made):
    rows = made.pairs([0.009 + n for n in NOISE])
    alone = gains(made.table(rows)).iloc[0]
    assert alone["p_adjusted"] == pytest.approx(alone["p_value"])
    for depth in range(2, 8):
        rows += made.pairs(NOISE, dataclasses.replace(made.TINY, inner_steps=depth))
    among_seven = gains(made.table(rows)).iloc[0]
    assert among_seven["p_adjusted"] == pytest.approx(7 * alone["p_value"])
    assert (alone["statement"], among_seven["statement"]) == ("FULL higher", NO_DIFFERENCE)


def test_means_are_over_seeds(made):
    rows = made.pairs([0.1, 0.3])
    rows[0] |= {"attn_grad_norm_q": 3.0, "attn_grad_norm_k": 4.0, "attn_grad_norm_v": 0.0}
    full = cells(made.table(rows)).iloc[0]
    assert (full["mode"], full["seeds"]) == ("FULL", 2)
    assert full["final_acc"] == pytest.approx((0.6 + 0.83) / 2)
    assert full["final_acc_ci95"] == pytest.approx(12.706 * 0.115, rel=1e-3)
    assert full["attn_grad_norm"] == pytest.approx((5 + math.sqrt(0.75)) / 2)


def test_variants_are_compared_with_sound_attention_at_the_same_seed_and_mode(made):
    broken = dataclasses.replace(made.TINY, variant="detach_key")
    rows = made.pairs([0.2 + n / 10 for n in NOISE]) + made.pairs([0.1] * 8, broken)
    found = against_baseline(made.table(rows)).set_index("mode")
    assert found.loc["FULL", "gain"] == pytest.approx(-0.1)
    assert found.loc["FULL", "statement"] == "baseline higher"
    assert found.loc["FO", "statement"] == NO_DIFFERENCE


def strict_rows(ledger: Ledger, made, change: float) -> list[dict]:
    rows = []
    for mode, factor in (("FO", 1.0), ("FO_STRICT", 1 + change)):
        run = dataclasses.replace(made.TINY, mode=mode)
        values = np.array([1.0, 1.0, factor, 1.0])
        ledger.write_curves(run, {"loss": values, "grad_norm_q_proj": np.ones(4)})
        rows.append(made.row(run, 0.5))
    return rows


@pytest.mark.parametrize(("change", "holds"), [(0.0, True), (1e-5, True), (1e-3, False)])
def test_one_step_apart_is_disagreement(tmp_path, made, change, holds):
    ledger = Ledger(tmp_path, "t")
    found = strict_agreement(made.table(strict_rows(ledger, made, change)), ledger)
    assert found.holds is holds
    assert found.largest == pytest.approx(change)
    assert (found.compared, found.steps) == (1, 4)
    assert bool(found.disagreeing) is not holds


@pytest.mark.parametrize("status", ["FAILED", "NON_FINITE"])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_run_without_figures_is_disagreement(tmp_path, made, status, broken):
    ledger = Ledger(tmp_path, "t")
    rows = strict_rows(ledger, made, 0.0)
    rows[broken]["status"] = status
    found = strict_agreement(made.table(rows), ledger)
    assert not found.holds
    assert found.disagreeing == (
        f"reference baseline k=1 seed 0 on cpu ({rows[broken]['mode']} is {status})",
    )
    assert (found.compared, found.steps) == (1, 0)


def test_missing_partners_and_curves_are_disagreement(tmp_path, made):
    ledger = Ledger(tmp_path, "t")
    rows = strict_rows(ledger, made, 0.0)
    lone = [
        made.row(dataclasses.replace(made.TINY, mode=mode, seed=seed), 0.5)
        for seed, mode in ((7, "FO"), (8, "FO_STRICT"))
    ]
    both = [made.row(dataclasses.replace(made.TINY, mode=m, seed=9), 0.5) for m in ("FO", "FO_STRICT")]
    ledger.write_curves(dataclasses.replace(made.TINY, mode="FO", seed=9), {"loss": np.ones(4)})
    found = strict_agreement(made.table([*rows, *lone, *both]), ledger)
    assert not found.holds
    said = "; ".join(found.disagreeing)
    for part in ("seed 7 on cpu (no FO_STRICT run)", "seed 8 on cpu (no FO run)", "FO_STRICT has no curves"):
        assert part in said
    assert len(found.disagreeing) == 3
    assert found.compared == 4


def test_a_study_without_strict_runs_asserts_nothing(tmp_path, made):
    found = strict_agreement(made.table(made.pairs([0.1])), Ledger(tmp_path, "t"))
    assert (found.compared, found.disagreeing, found.holds) == (0, (), False)


def test_nothing_compared_is_no_agreement(tmp_path, made):
    assert not strict_agreement(made.table(made.pairs([0.1])), Ledger(tmp_path, "t")).holds


def signalled(made, slope: float) -> list[dict]:
    rows = []
    for depth in (1, 2, 3, 4):
        base = dataclasses.replace(made.TINY, inner_steps=depth)
        rows += made.pairs([slope * depth + n for n in NOISE], base, attn_rel_diff=depth / 10)
    return rows


@pytest.mark.parametrize("slope", [0.05, -0.05])
def test_gain_that_follows_signal_is_found(made, slope):
    found = correlation(pairs(made.table(signalled(made, slope))))
    assert found.coefficient * np.sign(slope) > 0.9
    assert found.low * found.high > 0
    assert (found.points, found.seeds) == (32, 8)


def test_gain_without_signal_is_not(made):
    found = correlation(pairs(made.table(signalled(made, 0.0))))
    assert found.low <= 0 <= found.high


def test_a_signal_that_never_changes_correlates_with_nothing(made):
    found = correlation(pairs(made.table(made.pairs(NOISE))))
    assert math.isnan(found.coefficient)


def test_two_seeds_have_no_interval(made):
    rows = [row for row in signalled(made, 0.05) if row["seed"] < 2]
    found = correlation(pairs(made.table(rows)))
    assert found.coefficient > 0.9
    assert math.isnan(found.low)


def test_rounding_of_means_breaks_no_ties_of_rank(made):
    """Gains that are equal but for the last bits of a float share a rank, as in the paired interval."""
    table = pd.DataFrame({"seed": [0] * 4 + [1] * 4 + [2] * 4, "attn_rel_diff": [0.1, 0.2, 0.3, 0.4] * 3})
    exact, noisy = (
        correlation(table.assign(gain=gains * 3))
        for gains in ([0.1, 0.1, 0.1, 0.2], [0.1, 0.1 - 3e-17, 0.1 - 6e-17, 0.2])
    )
    assert exact.coefficient == pytest.approx(stats.spearmanr([1, 2, 3, 4], [1, 1, 1, 2]).statistic)
    assert (noisy.coefficient, noisy.low, noisy.high) == (exact.coefficient, exact.low, exact.high)


def test_the_interval_of_a_correlation_holds_95_percent_of_the_resamples():
    generator = np.random.default_rng(5)
    table = pd.DataFrame({"seed": np.repeat(np.arange(10), 4), "attn_rel_diff": generator.normal(size=40)})
    table["gain"] = 0.4 * table["attn_rel_diff"] + generator.normal(size=40)
    points = table[["attn_rel_diff", "gain"]].to_numpy().reshape(10, 4, 2)
    resampled = [points[generator.integers(0, 10, 10)].reshape(40, 2) for _ in range(1500)]
    coefficients = [stats.spearmanr(*sample.T).statistic for sample in resampled]
    low, quarter, high = np.percentile(coefficients, [2.5, 25, 97.5])
    found = correlation(table)
    assert found.low == pytest.approx(low, abs=0.04)
    assert found.high == pytest.approx(high, abs=0.04)
    assert quarter - low > 0.1


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Run) if field.name != "mode"])
def test_a_pair_agrees_in_every_field_but_the_mode(made, name):
    value = getattr(made.TINY, name)
    other = not value if isinstance(value, bool) else value + "x" if isinstance(value, str) else value + 1
    full = dataclasses.replace(made.TINY, mode="FULL")
    first = dataclasses.replace(made.TINY, mode="FO")
    unlike = dataclasses.replace(first, **{name: other})
    rows = [made.row(full, 0.9), made.row(unlike, 0.1)]
    assert pairs(made.table(rows)).empty
    assert pairs(made.table([*rows, made.row(first, 0.5)]))["gain"].tolist() == pytest.approx([0.4])
