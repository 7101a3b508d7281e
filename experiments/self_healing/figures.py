"""What the files of runs amount to."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from callbacks.perplexity_baseline import PerplexityBaseline
from callbacks.training_health import TrainingHealth, Trigger
from experiments.self_healing.faults import FAULTS
from experiments.self_healing.jobs import JOBS
from experiments.self_healing.runs import Figures

POISON_STEPS = 20
POISON_FACTOR = 10.0
CAUGHT_WITHIN = 3
LOSS_WITHIN = 0.01


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run with a fault ended.

    Attributes:
        caught_after: for each rollback, how many steps after the first broken one training was taken back,
            0 for the same; None for a fault that was not found.
        loss_change: of the final validation loss, relative to the undisturbed run's; NaN without one.
    """

    caught_after: tuple[int | None, ...]
    loss_change: float

    @property
    def is_caught(self) -> bool:
        """Every fault within the target."""
        return all(after is not None and after <= CAUGHT_WITHIN for after in self.caught_after)

    @property
    def is_healed(self) -> bool:
        """The final loss is the undisturbed run's, within the target."""
        return abs(self.loss_change) <= LOSS_WITHIN


def alarms(losses: Iterable[float], trigger: Trigger, patience: int) -> int:
    """Faults that a trigger finds in a stream of losses, with each forgotten at once and nothing undone."""
    health = TrainingHealth(PerplexityBaseline(), trigger, patience)
    found = 0
    for step, loss in enumerate(losses, start=1):
        health.observe(step, step, loss, 0.0)
        if health.fault is not None:
            found += 1
            health.start_again(0)
    return found


def poisoned_shift(losses: Sequence[float]) -> float:
    """How far steps of much higher perplexity, behind those of a run, move the baseline, relative to it."""
    baseline = PerplexityBaseline()
    for loss in losses:
        baseline.judge(loss)
    before = baseline.ema
    for _ in range(POISON_STEPS):
        baseline.judge(math.log(POISON_FACTOR * before))
    return abs(baseline.ema / before - 1)


def outcome(run: Figures, undisturbed: Figures) -> Outcome:
    """How quickly the faults of a run were found, and where it ended beside the undisturbed one."""
    caught: list[int | None] = []
    begun = 0
    for end in _rollbacks(run["losses"]):
        hit = [index for index in run["hit"] if begun < index <= end]
        caught.append(end - hit[0] if hit else None)
        begun = end
    caught += [None] * (FAULTS[run["fault"]].count - len(caught))
    change = math.nan
    if run["validation"]:
        name = JOBS[run["job"]].validation_loss
        change = run["validation"][name] / undisturbed["validation"][name] - 1
    return Outcome(tuple(caught), change)


def _rollbacks(losses: Sequence[tuple[int, float]]) -> list[int]:
    """How many steps had been taken at each rollback, after which their numbers go back."""
    return [index for index in range(1, len(losses)) if losses[index][0] <= losses[index - 1][0]]
