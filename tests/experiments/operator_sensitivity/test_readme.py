"""What the README and the configurations say of the study is what its tables hold."""

import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from experiments.operator_sensitivity.search import ranked
from experiments.operator_sensitivity.statistics import PAIRED, gains, paired_interval, successful

REPOSITORY = Path(__file__).parents[3]
RESULTS = REPOSITORY / "docs" / "results"
README = " ".join((REPOSITORY / "README.md").read_text().split())


def rows(tag):
    return pd.read_csv(RESULTS / f"operator_sensitivity_{tag}_all.csv")


def stated(pattern):
    """The number that the README gives at the place of (NUMBER)."""
    found = re.search(pattern.replace("(NUMBER)", r"([+-]?\.\d+|\d+)"), README)
    assert found, pattern
    return float(found[1])


def test_the_frozen_task():
    table = gains(rows("paired")).set_index("inner_steps")
    assert (table["pairs"] >= 8).all()
    assert (table.loc[[1, 20], "low"] > 0).all()
    assert stated(r"one inner step \(accuracy (NUMBER) over FO") == pytest.approx(
        table.loc[1, "gain"], abs=5e-4
    )
    assert stated(r"hardly beyond \((NUMBER) at 20") == pytest.approx(table.loc[20, "gain"], abs=5e-4)


def test_the_search():
    ranking = ranked(rows("search"))
    assert stated(r"of (NUMBER) regimes") == len(ranking) >= 60
    assert stated(r"higher in (NUMBER) and") == ranking["statement"].str.startswith("FULL").sum()
    assert stated(r"and lower in (NUMBER)") == ranking["statement"].str.startswith("FO ").sum()


def test_the_regime_that_was_confirmed():
    everything = rows("search_confirmed")
    (found,) = gains(everything).to_dict("records")
    assert found["pairs"] == 8
    assert found["low"] > 0
    assert not set(everything["seed"]) & set(rows("search")["seed"])
    assert stated(r"gains (NUMBER) \(") == pytest.approx(found["gain"], abs=5e-4)
    overlay = yaml.safe_load((REPOSITORY / "configs/task/second_order_pays.yaml").read_text())
    assert overlay == yaml.safe_load((RESULTS / "operator_sensitivity_search_regime.yaml").read_text())


def test_full_through_attention_without_a_graph():
    good = successful(rows("variants"))
    shared = [name for name in PAIRED if name != "variant"]
    broken = good[(good["variant"] == "raw_kernel_backward") & (good["mode"] == "FULL")]

    def beside(mode, inner_steps):
        sound = good[(good["variant"] == "baseline") & (good["mode"] == mode)]
        both = broken[broken["inner_steps"] == inner_steps].merge(
            sound[[*shared, "final_acc"]], on=shared, suffixes=("", "_sound")
        )
        found = paired_interval((both["final_acc"] - both["final_acc_sound"]).to_numpy())
        assert found.count == 8
        assert not found.low <= 0 <= found.high
        return found.mean

    for pattern, mode, inner_steps, sign in (
        (r"ends (NUMBER) below FULL through sound attention at one inner step", "FULL", 1, -1),
        (r"\(and (NUMBER) below FO\)", "FO", 1, -1),
        (r"(NUMBER) below it at 5", "FULL", 5, -1),
        (r"(NUMBER) above it at 20", "FULL", 20, 1),
    ):
        assert stated(pattern) == pytest.approx(sign * beside(mode, inner_steps), abs=5e-4)
