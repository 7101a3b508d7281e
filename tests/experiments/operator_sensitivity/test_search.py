"""The search: which configurations, who wins, and that the confirmation is fresh."""

import dataclasses

import pytest

from experiments.operator_sensitivity import execute as module
from experiments.operator_sensitivity import search
from experiments.operator_sensitivity.cli import main
from experiments.operator_sensitivity.runs import Run
from experiments.operator_sensitivity.search import (
    FRESH_SEEDS,
    LEVELS,
    SEARCH_SEEDS,
    configurations,
    overlay,
    paired_runs,
    ranked,
    winner,
)
from lightning_modules.cli import main as theria


def test_enough_configurations_and_all_different():
    chosen = configurations(Run(), 72)
    assert len({run.run_id for run in chosen}) == 72
    for name, levels in LEVELS.items():
        counts = [sum(getattr(run, name) == level for run in chosen) for level in levels]
        assert min(counts) >= 72 / len(levels) / 2, name
    assert configurations(Run(), 60) == chosen[:60]
    assert len(configurations(Run(), 405)) == 405
    with pytest.raises(ValueError, match="1 to 405"):
        configurations(Run(), 406)


def test_at_least_sixty_by_three_seeds_and_eight_that_are_fresh():
    assert len(paired_runs(configurations(Run(), 60), SEARCH_SEEDS)) == 60 * 3 * 2
    assert len(FRESH_SEEDS) == 8
    assert not set(SEARCH_SEEDS) & set(FRESH_SEEDS)


def test_the_winner_is_deep_enough_and_surely_better(made):
    bases = {
        "shallow": dataclasses.replace(made.TINY, inner_steps=1),
        "unsure": dataclasses.replace(made.TINY, inner_steps=5, noise=2.0),
        "sure": dataclasses.replace(made.TINY, inner_steps=5, noise=0.5),
        "smaller": dataclasses.replace(made.TINY, inner_steps=10),
    }
    gains = {
        "shallow": [0.2, 0.2, 0.201],
        "unsure": [0.3, -0.1, 0.3],
        "sure": [0.1, 0.1, 0.101],
        "smaller": [0.05, 0.05, 0.051],
    }
    ranking = ranked(made.table([row for name in bases for row in made.pairs(gains[name], bases[name])]))
    assert winner(ranking, 5) == dataclasses.replace(bases["sure"], mode="FULL", seed=0)
    assert winner(ranking, 1).inner_steps == 1
    assert winner(ranking, 10).inner_steps == 10
    assert winner(ranking, 11) is None


def test_the_regime_is_configuration_alone(tmp_path, made):
    path = tmp_path / "regime.yaml"
    path.write_text(overlay(dataclasses.replace(Run(), noise=2.0, inner_steps=10, seq_len=64)))
    arguments = ["fit", "--config", "configs/meta_seqcls.yaml", "--config", str(path), "--print_config"]
    with pytest.raises(SystemExit) as stopped:
        theria(arguments)
    assert stopped.value.code == 0


@pytest.fixture
def trained(monkeypatch, made):
    """Runs without training, of which FULL is better at 5 inner steps or more."""

    def perform(run, commit):
        gain = 0.1 + run.seed % 3 / 1000 if run.mode == "FULL" and run.inner_steps >= 5 else 0.0
        return made.row(run, 0.5 + gain), {}

    monkeypatch.setattr(module, "perform", perform)


def test_a_winner_is_confirmed_on_seeds_the_search_never_saw(tmp_path, trained):
    options = ["search", "--configurations", "12", "--jobs", "1", "--out", str(tmp_path), "--tag", "s"]
    assert main([*options, "--shard", "0/2"]) == 0
    page = tmp_path / "operator_sensitivity_s.md"
    assert "36 runs are missing, so no winner is named" in page.read_text()
    assert not (tmp_path / "operator_sensitivity_s_regime.yaml").exists()
    assert main([*options, "--shard", "1/2"]) == 0
    text = page.read_text()
    assert "12 configurations with figures, 3 seeds" in text
    assert "The winner, confirmed below" in text
    assert "## s_confirmed" in text
    assert "FULL higher (+0.10" in text
    assert (tmp_path / "operator_sensitivity_s_regime.yaml").read_text().startswith("model:")


def test_a_search_that_finds_nothing_says_so(tmp_path, trained):
    options = ["--configurations", "6", "--jobs", "1", "--out", str(tmp_path), "--least-depth", "21"]
    assert main(["search", *options]) == 0
    assert "No configuration of that depth" in (tmp_path / "operator_sensitivity_search.md").read_text()


def test_seeds_that_are_not_fresh_are_refused(tmp_path, capsys):
    assert main(["search", "--seeds", "200", "1", "--out", str(tmp_path)]) == 2
    assert "fresh seeds" in capsys.readouterr().err


def test_means_are_those_of_the_pairs_and_what_is_left_out_is_listed(tmp_path, made, monkeypatch):
    """At one seed FULL diverges, and the FO run of that seed would move the mean of the others."""

    def perform(run, commit):
        if run.inner_steps == 20 and run.seed == 102 and run.mode == "FULL":
            return made.row(run, 0.0, final_acc="", status="NON_FINITE", error="not finite at step 3"), {}
        return made.row(run, {100: 0.5, 101: 0.6, 102: 0.9}[run.seed] + 0.1 * (run.mode == "FULL")), {}

    monkeypatch.setattr(module, "perform", perform)
    monkeypatch.setattr(search, "draw_all", lambda *_, **__: [])
    options = ["--configurations", "8", "--jobs", "1", "--out", str(tmp_path), "--least-depth", "21"]
    assert main(["search", *options]) == 0
    text = (tmp_path / "operator_sensitivity_search.md").read_text()
    table = [line.split(" | ") for line in text.splitlines() if line.count("|") > 10]
    deep = [cells for cells in table if cells[4] == "20" and "NON_FINITE" not in cells]
    other = [cells for cells in table if cells[4] in ("1", "2", "5", "10")]
    assert deep
    assert other
    assert {tuple(cells[5:9]) for cells in deep} == {("0.6500", "0.5500", "2", "+0.1000")}
    assert {tuple(cells[5:9]) for cells in other} == {("0.7667", "0.6667", "3", "+0.1000")}
    assert f"{len(deep)} runs have no figures and are left out" in text
    assert text.count("| FULL | 102 | NON_FINITE | not finite at step 3 |") == len(deep)


def test_a_search_without_failures_lists_none(tmp_path, trained):
    options = ["--configurations", "2", "--jobs", "1", "--out", str(tmp_path), "--least-depth", "21"]
    assert main(["search", *options]) == 0
    assert "left out" not in (tmp_path / "operator_sensitivity_search.md").read_text()
