"""The command line, end to end on a very small task."""

import numpy as np
import pytest

from experiments.operator_sensitivity import execute as module
from experiments.operator_sensitivity import report, risk_checks, search
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


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of the time of a study without training."""
    monkeypatch.setattr(report, "draw_all", lambda *_, **__: [])


def curves(loss: float = 1.0) -> dict[str, np.ndarray]:
    return {"loss": np.array([loss]), **{f"grad_norm_{g}_proj": np.ones(1) for g in "qkv"}}


@pytest.mark.parametrize("order", [("0/2", "1/2"), ("1/2", "0/2")])
def test_shards_in_any_order_give_one_study(tmp_path, made, monkeypatch, undrawn, order):
    monkeypatch.setattr(module, "perform", lambda run, commit: (made.row(run, 0.5), curves()))
    options = [*SMALL, "--backends", "reference", "--tag", "t", "--out", str(tmp_path)]
    for part in order:
        assert main(["grid", *options, "--shard", part]) == 0
    table = Ledger(tmp_path, "t").read()
    assert len(table) == 24
    assert table["mode"].tolist() == ["FULL"] * 8 + ["FO"] * 8 + ["FO_STRICT"] * 8


def test_a_strict_run_that_disagrees_fails_the_study(tmp_path, made, monkeypatch, undrawn, capsys):
    def perform(run, commit):
        return made.row(run, 0.5), curves(1.0 + (run.mode == "FO_STRICT") / 100)

    monkeypatch.setattr(module, "perform", perform)
    options = ["--backends", "reference", "--tag", "t", "--out", str(tmp_path), "--jobs", "1"]
    assert main(options) == 1
    assert "FO and FO_STRICT disagree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "part"),
    [("FAILED", []), ("NON_FINITE", ["--shard", "1/2"]), ("OK", []), ("OK", ["--shard", "1/2"])],
)
def test_a_strict_run_that_cannot_be_compared_fails_the_study(
    tmp_path, made, monkeypatch, undrawn, capsys, status, part
):
    """A strict run without figures, or without curves."""

    def perform(run, commit):
        if run.mode != "FO_STRICT" or run.inner_steps != 5:
            return made.row(run, 0.5), curves()
        return made.row(run, 0.5, status=status), curves() if status == "NON_FINITE" else {}

    monkeypatch.setattr(module, "perform", perform)
    options = ["--backends", "reference", "--modes", "FO", "FO_STRICT", "--inner-steps", "1", "5", "10"]
    options += ["--seeds", "0", "--tag", "t", "--out", str(tmp_path), "--jobs", "1"]
    if part:
        assert main(["grid", *options, "--shard", "0/2"]) in (0, 1)
        capsys.readouterr()
    assert main(["grid", *options, *part]) == 1
    said = capsys.readouterr().err
    assert "reference baseline k=5 seed 0 on cpu" in said
    assert ("FO_STRICT has no curves" if status == "OK" else f"FO_STRICT is {status}") in said


def test_a_shard_does_not_blame_what_others_have_still_to_do(tmp_path, made, monkeypatch, undrawn):
    monkeypatch.setattr(module, "perform", lambda run, commit: (made.row(run, 0.5), curves()))
    options = ["--backends", "reference", "--modes", "FO", "FO_STRICT", "--inner-steps", "1", "5", "10"]
    options += ["--seeds", "0", "--tag", "t", "--out", str(tmp_path), "--jobs", "1"]
    assert main(["grid", *options, "--shard", "1/2"]) == 0
    page = ["report", "--tag", "t", "--source", str(tmp_path), "--page", str(tmp_path / "page.md")]
    assert main(page) == 1
    assert main(["grid", *options, "--shard", "0/2"]) == 0
    assert main(page) == 0


CUDA = ["--device", "cuda", "--modes", "FULL", "FO", "--jobs", "1", "--tag", "t"]


@pytest.fixture
def on_cuda(made, monkeypatch, undrawn):
    """Backends of the runs that were done, as if there were a GPU; FULL is better at every depth."""
    done: list[str] = []

    def perform(run, commit):
        done.append(run.backend)
        gain = 0.1 + run.seed / 1000 if run.mode == "FULL" else 0.0
        return made.row(run, 0.5 + gain), {}

    monkeypatch.setattr(module, "perform", perform)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    return done


def test_gated_runs_wait_for_the_gate(tmp_path, on_cuda, capsys):
    options = [
        "--device",
        "cuda",
        "--modes",
        "FULL",
        "FO",
        "--jobs",
        "1",
        "--tag",
        "t",
        "--out",
        str(tmp_path),
    ]
    assert main([*options, "--inner-steps", "1", "--seeds", "0", "1", "2"]) == 3
    assert "gate: CLOSED" in capsys.readouterr().out
    assert on_cuda == ["reference"] * 6
    assert main([*options, "--inner-steps", "1", "5", "--seeds", "0", "1", "2"]) == 0
    assert "gate: OPEN" in capsys.readouterr().out
    assert on_cuda == ["reference"] * 12 + ["triton_fused"] * 12


def test_the_gate_is_judged_on_the_runs_of_all_shards(tmp_path, on_cuda, capsys):
    """A shard whose own gated runs have all their reference runs waits for the others' all the same."""
    options = [
        "--device",
        "cuda",
        "--modes",
        "FULL",
        "FO",
        "--jobs",
        "1",
        "--tag",
        "t",
        "--out",
        str(tmp_path),
    ]
    options += ["--inner-steps", "5", "10", "--seeds", *map(str, range(4))]
    assert main([*options, "--shard", "0/2"]) == 3
    assert "8 of 16 reference runs succeeded on cuda" in capsys.readouterr().out
    assert set(on_cuda) == {"reference"}
    assert main([*options, "--shard", "1/2"]) == 0
    assert "16 of 16 reference runs succeeded on cuda" in capsys.readouterr().out
    assert on_cuda == ["reference"] * 16 + ["triton_fused"] * 8


@pytest.fixture
def idle(monkeypatch):
    """Nothing may run."""
    for where, name in ((module, "perform"), (search, "execute"), (risk_checks, "prepare_process")):
        monkeypatch.setattr(where, name, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-signal-positions", "40"], "num_signal_positions"),
        (["--device", "cuda"], "no CUDA device"),
        (["--outer-steps", "0"], "outer_steps must be at least 1, got 0"),
        (["--inner-steps", "5", "-1"], "inner_steps must be at least 0, got -1"),
        (["--meta-batch-size", "0"], "meta_batch must be at least 1, got 0"),
        (["--seeds", "-1"], "seed must be at least 0, got -1"),
        (["--inner-lr", "nan"], "inner_lr must be a finite number above 0, got nan"),
        (["--inner-lr", "0"], "inner_lr must be a finite number above 0, got 0.0"),
        (
            ["--variants", "baseline", "detach_value", "--absorb-projections"],
            "detach_value is tested on projections that are not absorbed",
        ),
        (["--outer-lr", "inf"], "outer_lr must be a finite number above 0, got inf"),
        (["--outer-lr=-1e-3"], "outer_lr must be a finite number above 0, got -0.001"),
        (["--variants", "baseline", "nosuch"], "there is no variant 'nosuch'"),
        (["--jobs", "-1"], "--jobs must be at least 0"),
        (["risk", "--outer-steps", "1"], "--outer-steps must be at least 2"),
        (["search", "--outer-steps", "0"], "outer_steps must be at least 1"),
        *(
            ([command, "--tag", tag], f"got {tag!r}")
            for command, tag in (
                ("grid", "a/b"),
                ("grid", "a[b]"),
                ("search", "*"),
                ("risk", ""),
                ("grid", "a\n"),
            )
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, idle, capsys, options, said):
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["grid", "search", "risk"])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_place_of_the_directory_is_refused(tmp_path, idle, capsys, command, below):
    (tmp_path / "file").write_text("")
    assert main([command, "--out", str(tmp_path / "file" / below)]) == 2
    error = capsys.readouterr().err
    assert "is a file, not a directory" in error
    assert error.count("\n") == 1


def test_a_report_of_a_tag_without_rows_is_refused(tmp_path, capsys):
    page = tmp_path / "out" / "page.md"
    assert main(["report", "--tag", "nosuch", "--source", str(tmp_path / "none"), "--page", str(page)]) == 2
    assert capsys.readouterr().err.count("there are no rows of nosuch") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_grid_with_failed_runs_says_how_many(tmp_path, made, monkeypatch, undrawn, capsys):
    def perform(run, commit):
        return made.row(run, 0.5, status={5: "FAILED", 10: "NON_FINITE"}.get(run.inner_steps, "OK")), {}

    monkeypatch.setattr(module, "perform", perform)
    options = ["--backends", "reference", "--modes", "FULL", "FO", "--seeds", "0", "--jobs", "1"]
    options += ["--tag", "t", "--out", str(tmp_path)]
    assert main([*options, "--inner-steps", "1", "5", "10"]) == 1
    assert "4 of 6 runs have no figures" in capsys.readouterr().err
    # rows of other runs of the study are not this call's
    assert main([*options, "--inner-steps", "1"]) == 0


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    assert "search" in capsys.readouterr().out
