"""G2-2: the needle probe runs as often as was decided, and costs less than a hundredth of training."""

import re

from experiments.training_gates.gate import Gate
from experiments.training_gates.niah_frequency import LIMIT, Cost

_DECISION = re.compile(r"Locked: \*\*every ([\d,]+) steps\*\*")


def locked_in(page: str) -> list[int]:
    """The frequencies that a page of ``niah-frequency`` has decided, in steps from probe to probe."""
    return [int(steps.replace(",", "")) for steps in _DECISION.findall(page)]


def overhead_gate(page: str, cost: Cost, *, configured: int) -> Gate:
    """Whether probes are no more frequent than decided, and their cost now is within the limit.

    Args:
        page: of the decision, empty where there is none.
        cost: measured now.
        configured: steps from probe to probe in training.
    """
    locked = locked_in(page)
    share, most = cost.overhead(configured)
    decided = ", ".join(f"every {steps}" for steps in locked) or "nothing"
    return Gate(
        "G2-2",
        f"decided {decided}, training probes every {configured} steps; measured again, a probe takes "
        f"{1e3 * cost.probe.value:.0f} ms and a step {1e3 * cost.step.value:.0f} ms, an overhead of "
        f"{share:.3%}, at most {most:.3%}",
        f"at most as often as decided, an overhead whose upper end is below {LIMIT:.0%}",
        bool(locked) and configured >= max(locked) and 0 < most < LIMIT,
    )
