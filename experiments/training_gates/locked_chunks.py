"""G2-1: the chunk sizes of the memory are decided, and the decision still holds where training runs."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from experiments.training_gates.chunk_sizes import Measurement, default_of, locked_set
from experiments.training_gates.gate import Gate

SLOWER = 1.25
"""Times the fastest chunk's seconds that the decided one may take, measured shortly on a shared machine."""

_DECISION = re.compile(r"Locked set: \{([\d, ]+)\}\. Default: \*\*(\d+)\*\*\.")


class Decision(NamedTuple):
    """What a section of the page has decided."""

    locked: tuple[int, ...]
    default: int


def decisions_in(page: str) -> list[Decision]:
    """The decisions of a page of ``chunk-sizes``, one a device."""
    return [
        Decision(tuple(int(chunk) for chunk in locked.split(",")), int(default))
        for locked, default in _DECISION.findall(page)
    ]


def chunk_gate(page: str, measured: Sequence[Measurement], *, tolerance: float, configured: int) -> Gate:
    """Whether the page decides, and its sets agree and its default is fast in new measurements.

    Args:
        page: of the decision, empty where there is none.
        measured: all candidates, now.
        tolerance: of their difference from the reference.
        configured: the chunk size that training uses.
    """
    decisions = decisions_in(page)
    decided = sorted(set().union(*(decision.locked for decision in decisions)))
    agree = locked_set(measured, tolerance)
    seconds = {m.chunk_size: m.seconds for m in measured}
    fastest = default_of(measured, agree) if agree else None
    ratio = seconds[configured] / seconds[fastest] if fastest and configured in seconds else float("inf")
    passed = (
        set(decided) <= set(agree)
        and all(configured in decision.locked for decision in decisions)
        and configured in {decision.default for decision in decisions}
        and ratio <= SLOWER
    )
    defaults = ", ".join(str(decision.default) for decision in decisions) or "none"
    worst = max(m.difference for m in measured)
    return Gate(
        "G2-1",
        f"decided {_braces(decided)}, default {defaults}, training uses {configured}; measured again, "
        f"{_braces(agree)} agree (largest difference {worst:.1e}), {configured} takes {ratio:.2f} times the "
        f"fastest, {fastest}",
        f"all decided sizes differ by at most {tolerance:g}, training uses the default, at most {SLOWER:g} "
        "times the fastest",
        passed,
    )


def _braces(chunks: Sequence[int]) -> str:
    return f"{{{', '.join(map(str, chunks))}}}"
