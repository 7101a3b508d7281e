"""The command line, end to end on a very small task."""

import pytest

from experiments.operator_sensitivity import execute as module
from experiments.operator_sensitivity.__main__ import main
from experiments.operator_sensitivity.ledger import Ledger

pytestmark = [
    # what Lightning has to say about a trainer without workers
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]

SMALL = ["--outer-steps=3", "--meta-batch-size=2", "--seq-len=4", "--width=4", "--jobs=1"]
SMALL.append("--num-signal-positions=1")


def test_one_command_gives_tables_pictures_and_page(tmp_path, capsys):
    options = [*SMALL, "--inner-steps", "1", "--seeds", "0", "--tag", "t", "--out", str(tmp_path)]
    # one seed proves no difficulty, so the gate stays closed
    assert main(options) == 3
    said = capsys.readouterr().out
    assert "gate: CLOSED for triton_fused" in said
    assert "3 of 3 reference runs succeeded on cpu" in said
    assert main([*options, "--override-gate", "task-difficulty"]) == 0
    assert "they train on --device cuda" in capsys.readouterr().out
    assert {p.suffix for p in tmp_path.glob("operator_sensitivity_t*")} == {".md", ".csv", ".png", ".svg"}
    assert len(Ledger(tmp_path, "t").read()) == 3
    page = tmp_path / "page" / "page.md"
    page.parent.mkdir()
    assert main(["report", "--tag", "t", "--source", str(tmp_path), "--page", str(page)]) == 0
    assert page.read_text().startswith("# Operator sensitivity")


@pytest.mark.parametrize("order", [("0/2", "1/2"), ("1/2", "0/2")])
def test_shards_in_any_order_give_one_study(tmp_path, made, monkeypatch, order):
    monkeypatch.setattr(module, "perform", lambda run, commit: (made.row(run, 0.5), {}))
    options = [*SMALL, "--backends", "reference", "--tag", "t", "--out", str(tmp_path)]
    for part in order:
        assert main(["grid", *options, "--shard", part]) == 0
    table = Ledger(tmp_path, "t").read()
    assert len(table) == 24
    assert table["mode"].tolist() == ["FULL"] * 8 + ["FO"] * 8 + ["FO_STRICT"] * 8


def test_a_strict_run_that_disagrees_fails_the_study(tmp_path, made, monkeypatch, capsys):
    def perform(run, commit):
        loss = 1.0 + (run.mode == "FO_STRICT") / 100
        return made.row(run, 0.5), {"loss": [loss], **{f"grad_norm_{g}_proj": [1.0] for g in "qkv"}}

    monkeypatch.setattr(module, "perform", perform)
    options = ["--backends", "reference", "--tag", "t", "--out", str(tmp_path), "--jobs", "1"]
    assert main(options) == 1
    assert "FO and FO_STRICT disagree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-signal-positions", "40"], "num_signal_positions"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, capsys, options, said):
    assert main([*options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    assert "search" in capsys.readouterr().out
