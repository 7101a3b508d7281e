"""G2-1 passes for a decision that holds, and fails for everything that would not be one."""

from pathlib import Path

import pytest

from experiments.training_gates.chunk_sizes import Measurement
from experiments.training_gates.locked_chunks import Decision, chunk_gate, decisions_in

PAGE = Path(__file__).parents[3] / "docs" / "results" / "chunk_sizes.md"
DECISION = "Tolerance 0.0001. Locked set: {8, 16, 32, 64}. Default: **64**.\n"


def measured(**changes: tuple[float, float]) -> list[Measurement]:
    """Seconds and differences by chunk, those of c8, c16, ... changed."""
    found = {"c8": (4.0, 1e-7), "c16": (3.0, 1e-7), "c32": (2.0, 1e-7), "c64": (1.0, 1e-7)} | changes
    return [
        Measurement(int(name[1:]), "tensor", seconds, 0, difference)
        for name, (seconds, difference) in found.items()
    ]


def test_a_page_may_decide_for_several_devices():
    assert decisions_in(DECISION + DECISION.replace("8, 16", "16").replace("**64**", "**16**")) == [
        Decision((8, 16, 32, 64), 64),
        Decision((16, 32, 64), 16),
    ]
    assert decisions_in(PAGE.read_text())[0] == Decision((8, 16, 32, 64), 64)


def test_it_passes_where_the_decision_holds():
    gate = chunk_gate(DECISION, measured(c32=(0.85, 1e-7)), tolerance=1e-4, configured=64)
    assert gate.passed
    assert "decided {8, 16, 32, 64}, default 64, training uses 64" in gate.measured
    assert "64 takes 1.18 times the fastest, 32" in gate.measured


@pytest.mark.parametrize(
    ("page", "changes", "configured"),
    [
        ("", {}, 64),
        (DECISION.replace("**64**", "**48**"), {}, 64),
        (DECISION, {"c32": (1.0, 1e-7)}, 32),
        (DECISION, {}, 48),
        (DECISION, {"c16": (3.0, 1e-3)}, 64),
        (DECISION, {"c64": (1.0, 1e-3)}, 64),
        (DECISION, {"c64": (1.0, float("nan"))}, 64),
        (DECISION, dict.fromkeys(("c8", "c16", "c32", "c64"), (1.0, 1.0)), 64),
        (DECISION, {"c32": (0.7, 1e-7)}, 64),
        (DECISION + DECISION.replace(", 64}", "}").replace("**64**", "**32**"), {}, 64),
    ],
    ids=[
        "no decision",
        "a default outside of the set",
        "another one configured",
        "an unknown one configured",
        "one of the set is wrong",
        "the default is wrong",
        "the default is not finite",
        "all are wrong",
        "the default is slow",
        "locked out on another device",
    ],
)
def test_it_fails_where_it_does_not(page, changes, configured):
    gate = chunk_gate(page, measured(**changes), tolerance=1e-4, configured=configured)
    assert not gate.passed
    assert gate.name == "G2-1"
