"""The page and the pictures say what the CSV says, and nothing else."""

import dataclasses
import os
import re

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from experiments.operator_sensitivity import report, tables
from experiments.operator_sensitivity.answer import answer
from experiments.operator_sensitivity.ledger import Ledger, write_csv
from experiments.operator_sensitivity.plots import draw_all
from experiments.operator_sensitivity.report import combine, risk_checks_csv, write_page
from experiments.operator_sensitivity.runs import Run

NOISE = [0.01, -0.012, 0.004, -0.006, 0.002, 0.007, -0.009, 0.004]
PREFIX = "operator_sensitivity_t"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing here is about a loss of power, and a hundred files are written; pages name pictures."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(report, "draw_all", lambda table, ledger, directory, prefix: [f"{prefix}_gain.png"])


def strict_partner(made, row: dict) -> dict:
    """The FO_STRICT run of an FO run, with its figures."""
    fields = {f.name: row[f.name] for f in dataclasses.fields(Run)} | {"mode": "FO_STRICT"}
    run = Run(**fields)
    return row | {"mode": run.mode, "run_id": run.run_id}


def filled(directory, made, *, outer_steps: int = 4, seeds: int = 8) -> Ledger:
    """k=1 with a clear gain, k=10 with none, a broken variant at k=10, FO_STRICT beside every FO."""
    ledger = Ledger(directory, "t")
    rows = []
    for depth, gain in ((1, 0.05), (10, 0.0)):
        base = dataclasses.replace(made.TINY, inner_steps=depth, outer_steps=outer_steps)
        gains = [gain + n / 10 for n in NOISE[:seeds]]
        rows += made.pairs(gains, base, attn_rel_diff=1 / depth)
    broken = dataclasses.replace(base, variant="detach_attention_output")
    broken_figures = {"attn_second_order_path": 0.0, "attn_second_order_ok": False, "attn_rel_diff": 0.0}
    rows += made.pairs([-0.1 + n / 10 for n in NOISE[:seeds]], broken, **broken_figures)
    rows += [strict_partner(made, row) for row in rows if row["mode"] == "FO"]
    for row in rows:
        run = Run(**{f.name: row[f.name] for f in dataclasses.fields(Run)})
        norms = {f"grad_norm_{g}_proj": np.full(outer_steps, 0.5) for g in "qkv"}
        ledger.write_curves(run, {"loss": np.linspace(1.5, 1, outer_steps), **norms})
        ledger.append(row)
    return ledger


@pytest.fixture
def page(tmp_path, made) -> str:
    ledger = filled(tmp_path / "runs", made)
    lines, strict = combine(ledger, tmp_path / "out")
    assert strict.holds
    write_page([lines], tmp_path / "out" / "page.md", ["A preface."])
    return (tmp_path / "out" / "page.md").read_text()


def test_the_page_answers(page):
    assert "A preface." in page
    assert "(operator_sensitivity_t_gain.png)" in page
    assert "k = 1: FULL higher (+0.0500" in page
    assert "k = 10: no difference detected (+0.0000" in page
    assert "PASS: over 24 pairs of runs and 96 outer steps" in page
    assert "no third baseline" in page
    assert "1 of 1 cases differ in accuracy from sound attention (`detach_attention_output`)" in page


def test_the_mode_table_holds_signal_and_gain(page):
    (full,) = re.findall(r"\| reference \| FULL \| yes \| yes \| yes \| (.*) \|", page)
    assert full == "+0.0500 | +0.0000"
    (strict,) = re.findall(r"\| reference \| FO_STRICT \| yes \| yes \| no \| (.*) \|", page)
    assert strict == "+0.0000 | +0.0000"


def test_every_number_follows_the_csv(tmp_path, made):
    """A figure changed in the CSV changes on the page, in the mean and in the paired difference."""
    ledger = filled(tmp_path, made)
    before = "\n".join(combine(ledger, tmp_path / "out")[0])
    table = pd.read_csv(ledger.path, dtype={"run_id": str})
    chosen = (table["mode"] == "FULL") & (table["inner_steps"] == 1)
    table.loc[chosen, "final_acc"] -= 0.05
    table.loc[chosen, "attn_grad_present"] = False
    table.to_csv(ledger.path, index=False)
    after = "\n".join(combine(ledger, tmp_path / "out")[0])
    assert "k = 1: FULL higher (+0.0500" in before
    assert "k = 1: no difference detected (+0.0000" in after
    assert "| reference | FULL | no | yes | yes | +0.0000 | +0.0000 |" in after
    mean = table.loc[chosen & (table["variant"] == "baseline"), "final_acc"].mean()
    assert f"| reference | FULL | 1 | 8 | {mean:.4f} |" in after


def test_two_devices_are_two_lines_of_every_table(made):
    """On the CPU FULL gains at both depths, on CUDA nothing; variants lose by as much as they gained."""
    rows = []
    for device, gain in (("cpu", 0.05), ("cuda", 0.0)):
        for depth in (1, 10):
            base = dataclasses.replace(made.TINY, inner_steps=depth, device=device)
            rows += made.pairs([gain + n / 10 for n in NOISE], base, attn_rel_diff=depth * (1 + 10 * gain))
            rows += made.pairs([n / 10 for n in NOISE], dataclasses.replace(base, variant="detach_key"))
    good = made.table(rows)
    sound = good[good["variant"] == "baseline"]
    modes = "\n".join(tables.modes(sound))
    assert "| reference | cpu | FULL | yes | yes | yes | +0.0500 | +0.0500 |" in modes
    assert "| reference | cuda | FULL | yes | yes | yes | +0.0000 | +0.0000 |" in modes
    assert "| reference | cuda | FO |" in "\n".join(tables.accuracy(sound))
    paired = "\n".join(tables.paired(sound))
    assert "| reference | cpu | 10 | 8 | +0.0500 |" in paired
    assert "| reference | cuda | 10 | 8 | +0.0000 |" in paired
    correlations = tables.correlations(sound)[2:]
    assert [line.split(" | ")[:2] for line in correlations] == [
        ["| reference", "cpu"],
        ["| reference", "cuda"],
    ]
    assert all(" | 16 | 8 | " in line for line in correlations)
    variants = "\n".join(tables.variants(good))
    for device, lost in (("cpu", "-0.0500"), ("cuda", "+0.0000")):
        assert re.search(
            rf"reference \| {device} \| `detach_key` \| FULL \| 10 \|.* \| 8 \| \{lost} ", variants
        )


def test_one_device_is_no_column(made):
    assert "device" not in tables.modes(made.table(made.pairs(NOISE)))[0]


def test_a_study_of_two_devices_has_a_page(tmp_path, made, monkeypatch):
    monkeypatch.setattr(report, "draw_all", lambda *_: [])
    ledger = Ledger(tmp_path, "t")
    for device in ("cpu", "cuda"):
        for row in made.pairs(NOISE, dataclasses.replace(made.TINY, device=device)):
            ledger.append(row)
    assert "| reference | cuda | FULL |" in "\n".join(combine(ledger, tmp_path / "out")[0])


def test_published_numbers_stand_beside_runs_of_their_length_only(tmp_path, made):
    short = "\n".join(combine(filled(tmp_path / "a", made), tmp_path / "out")[0])
    long = "\n".join(combine(filled(tmp_path / "b", made, outer_steps=1000), tmp_path / "out")[0])
    assert "published" not in short
    assert re.search(r"\| reference \| FULL \| 10 \|.*\| 0.9385 \|", long)
    assert re.search(r"\| reference \| FO \| 10 \|.*\| 0.9350 \|", long)


def test_the_answer_claims_with_enough_seeds_alone(made):
    fused = dataclasses.replace(made.TINY, backend="triton_fused", device="cpu")
    gains = [0.05 + n / 10 for n in NOISE]
    few = made.pairs(gains[:2], dataclasses.replace(made.TINY, inner_steps=10, outer_steps=1000))
    tables = {"many": pd.DataFrame([*made.pairs(gains), *made.pairs(gains, fused)]), "few": pd.DataFrame(few)}
    text = "\n".join(answer(tables))
    assert "**many** (reference on cpu, 8 paired seeds, 4 outer steps)" in text
    assert f"k = 1: {np.mean(gains):+.4f} [" in text
    assert "FULL higher" in text
    assert "no claim: few" in text
    # FULL .565 and FO .515 over two seeds, published .9385 and .9350
    assert "Of 2 means that have a published one beside them" in text
    assert "0 are above it" in text
    assert (
        "**many**: 16 runs of triton_fused and the same runs of reference differ in accuracy by at most 0"
        in text
    )


def test_the_answer_says_what_losing_curvature_costs(made):
    """One variant is as sound attention, another gains nothing and keeps no curvature."""
    rows = made.pairs([0.05 + n / 10 for n in NOISE], attn_second_order_path=1.0)
    for name, gain, path in (("detach_key", 0.05, 0.9), ("raw_kernel_backward", 0.0, 0.0)):
        broken = dataclasses.replace(made.TINY, variant=name)
        rows += made.pairs([gain + n / 10 for n in NOISE], broken, attn_second_order_path=path)
    text = "\n".join(answer({"t": made.table(rows)}))
    assert "FULL at k = 1: baseline higher: raw_kernel_backward; no difference detected: detach_key." in text
    found = re.search(r"over 24 pairs .* rank correlation (\S+) \[(\S+), (\S+)\] with the curvature", text)
    assert found is not None
    middle, low, high = map(float, found.groups())
    assert 0.5 < low <= high < 1
    assert 0.5 < middle < 1


@pytest.mark.parametrize(("gain", "opens"), [(0.05, True), (0.0, False)])
def test_the_gate_of_fused_kernels_is_judged_on_the_page(tmp_path, made, gain, opens):
    ledger = Ledger(tmp_path / "runs", "t")
    gains = [gain + n / 10 for n in NOISE]
    base = dataclasses.replace(made.TINY, inner_steps=5)
    fused = dataclasses.replace(base, backend="triton_fused", device="cuda")
    for row in [*made.pairs(gains, base), *made.pairs(gains, fused)]:
        run = Run(**{f.name: row[f.name] for f in dataclasses.fields(Run)})
        norms = {f"grad_norm_{g}_proj": np.full(4, 0.5) for g in "qkv"}
        ledger.write_curves(run, {"loss": np.linspace(1.5, 1, 4), **norms})
        ledger.append(row)
    text = "\n".join(combine(ledger, tmp_path / "out")[0])
    assert f"gate: {'OPEN' if opens else 'CLOSED'} for triton_fused" in text
    assert ("--override-gate task-difficulty --tag t`" in text) is not opens


def test_two_seeds_are_called_a_reproduction(tmp_path, made):
    text = "\n".join(combine(filled(tmp_path, made, seeds=2), tmp_path / "out")[0])
    assert "2 seeds a configuration: a reproduction" in text


def test_the_csvs_are_named_by_tag_and_hold_every_run(tmp_path, made):
    ledger = filled(tmp_path, made)
    combine(ledger, tmp_path / "out")
    everything = pd.read_csv(tmp_path / "out" / f"{PREFIX}_all.csv")
    summary = pd.read_csv(tmp_path / "out" / f"{PREFIX}_summary.csv")
    assert len(everything) == len(ledger.read()) == 72
    assert len(summary) == 9
    first = summary[(summary["mode"] == "FULL") & (summary["inner_steps"] == 1)].iloc[0]
    assert first["gain"] == pytest.approx(0.05)
    assert first["statement"] == "FULL higher"


def test_risk_checks_of_the_tag_are_part_of_its_section(tmp_path, made):
    ledger = filled(tmp_path / "runs", made)
    assert "Risk checks" not in "\n".join(combine(ledger, tmp_path / "out")[0])
    row = {"name": "parity", "figure": 2.5e-5, "limit": 1e-5, "note": "", "verdict": "WARN"}
    write_csv([row], risk_checks_csv(tmp_path / "runs", "t"))
    lines, _ = combine(ledger, tmp_path / "out")
    assert "| WARN | parity | 2.5e-05 | 1e-05 |  |" in lines
    kept = pd.read_csv(tmp_path / "out" / f"{PREFIX}_risk_checks.csv", keep_default_na=False)
    assert kept.to_dict("records") == [row]


def test_failures_are_listed(tmp_path, made):
    ledger = filled(tmp_path, made)
    run = dataclasses.replace(made.TINY, backend="custom")
    ledger.append(made.row(run, 0.0, final_acc="", final_loss="", status="FAILED", error="out of memory"))
    text = "\n".join(combine(ledger, tmp_path / "out")[0])
    # 2 backends, 2 variants, 3 modes, 2 depths and 8 seeds make 192
    assert "73 runs, 72 succeeded, and 119 of the command are not done" in text
    assert "| custom | baseline | FULL | 1 | FAILED | out of memory |" in text


def test_a_study_in_which_nothing_succeeded_has_a_page(tmp_path, made):
    ledger = Ledger(tmp_path, "t")
    ledger.append(made.row(made.TINY, 0.0, final_acc="", status="FAILED", error="it broke"))
    assert "No run has succeeded." in combine(ledger, tmp_path / "out")[0]


def test_pictures_are_vector_and_raster(tmp_path, made):
    ledger = filled(tmp_path, made)
    names = draw_all(ledger.read(), ledger, tmp_path, "p")
    assert names == ["p_depth.png", "p_convergence.png", "p_gain.png", "p_variants.png"]
    for name in names:
        image = matplotlib.image.imread(tmp_path / name)
        assert image.std() > 0.01
        assert "<svg" in (tmp_path / name).with_suffix(".svg").read_text()


def test_modes_differ_without_colour(tmp_path, made):
    from experiments.operator_sensitivity.plots import _STYLES

    colours, markers, lines = zip(*_STYLES.values(), strict=True)
    assert len(set(markers)) == len(set(lines)) == 3
    rgb = np.array([matplotlib.colors.to_rgb(c) for c in colours])
    lightness = np.sort(rgb @ [0.2126, 0.7152, 0.0722])
    assert np.diff(lightness).min() > 0.1


def test_the_same_rows_draw_the_same_picture(tmp_path, made):
    ledger = filled(tmp_path, made)
    drawn = []
    for _ in range(2):
        draw_all(ledger.read(), ledger, tmp_path, "p", only=("gain",))
        drawn.append((tmp_path / "p_gain.svg").read_bytes())
    assert drawn[0] == drawn[1]
