"""The command that a page names makes the runs of the page."""

import dataclasses
import shlex

import pandas as pd
import pytest

from experiments.operator_sensitivity import cli
from experiments.operator_sensitivity.runs import Run, grid
from experiments.operator_sensitivity.summary import command


@pytest.mark.parametrize(
    ("base", "choices"),
    [
        (Run(), {"backends": ("reference",)}),
        (Run(absorb_projections=True), {"modes": ("FULL",), "backends": ("reference",)}),
        (Run(outer_steps=1000, noise=0.5), {"inner_steps": (10, 20), "backends": ("reference",)}),
        (
            Run(seq_len=48),
            {"modes": ("FULL", "FO"), "seeds": range(8), "variants": ("baseline", "raw_kernel_backward")},
        ),
    ],
)
def test_the_command_of_a_table_makes_its_runs(base, choices, monkeypatch, tmp_path):
    runs = grid(base, **choices)
    text = command(pd.DataFrame([dataclasses.asdict(run) for run in runs]), "mine")
    made = []
    monkeypatch.setattr(cli, "execute", lambda runs, *_, **__: made.extend(runs))
    monkeypatch.setattr(cli, "combine", lambda *_: ([], type("Strict", (), {"disagreeing": ()})))
    program, *arguments = shlex.split(text.removeprefix("python -m "))
    assert program == "experiments.operator_sensitivity"
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert {run.run_id for run in made} == {run.run_id for run in runs}


def test_conditions_that_the_runs_were_made_in_spite_of_are_named():
    runs = grid(Run(), backends=("reference", "triton_fused"))
    text = command(pd.DataFrame([dataclasses.asdict(run) for run in runs]), "mine", ["task-difficulty"])
    assert text == "python -m experiments.operator_sensitivity --override-gate task-difficulty --tag mine"
