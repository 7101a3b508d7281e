"""When training has to be taken back: the rules, on numbers alone."""

import math
from typing import Any, Literal, NamedTuple

from callbacks.perplexity_baseline import Judgement, PerplexityBaseline

Trigger = Literal["robust", "plain"]
TRIGGERS: tuple[Trigger, ...] = ("robust", "plain")


class Fault(NamedTuple):
    """What went wrong, and the steps and batches in which.

    Attributes:
        reason: in words.
        first_step, last_step: of the bad steps.
        first_batch, last_batch: where they began in the training stream.
    """

    reason: str
    first_step: int
    last_step: int
    first_batch: int
    last_batch: int


class TrainingHealth:
    """Judges every step, and finds a fault where bad ones follow each other.

    A step is bad if its loss or its largest gradient is not finite, which is a fault at once, or by the
    trigger, which is one after ``patience`` steps running:

    - ``robust``: an outlier of the baseline, which is above the threshold and beyond the usual noise; one
      whose z-score is above ``z_alone`` is a fault at once, as a single step that scales the optimiser's
      moments up can slow training down for long without a second bad step;
    - ``plain``: above the threshold. With patience 1, the simplest rule there is.

    Args:
        baseline: of perplexity.
        trigger: robust or plain.
        patience: bad steps running that make a fault.
        z_alone: z-score above which one bad step of ``robust`` makes a fault.
    """

    def __init__(
        self, baseline: PerplexityBaseline, trigger: Trigger, patience: int, z_alone: float = 12.0
    ) -> None:
        self.baseline = baseline
        self.trigger = trigger
        self.patience = patience
        self.z_alone = z_alone
        self.fault: Fault | None = None
        self.cool_until = 0
        self._bad: list[tuple[int, int]] = []

    def observe(self, step: int, batch: int, loss: float, gradient: float) -> tuple[Judgement, bool]:
        """Judge a step; the judgement, and whether the step was good."""
        was_warm = self.baseline.is_warm
        judged = self.baseline.judge(loss)
        for name, value in (("loss", loss), ("gradient", gradient)):
            if not math.isfinite(value):
                self._bad.append((step, batch))
                self._find(f"the {name} of step {step} is {value}")
                return judged, False
        rises = judged.is_outlier if self.trigger == "robust" else was_warm and judged.is_spike
        if not rises:
            self._bad.clear()
            return judged, True
        if step > self.cool_until:
            self._bad.append((step, batch))
            far_off = self.trigger == "robust" and judged.z_score > self.z_alone
            if far_off or len(self._bad) >= self.patience:
                self._find(
                    f"the perplexity of step {step}, {judged.perplexity:.4g}, is {judged.ppl_delta:+.1%} off "
                    f"its baseline at z = {judged.z_score:.1f}, {len(self._bad)} bad steps running"
                )
        return judged, False

    def start_again(self, cool_until: int) -> None:
        """Forget what was bad; until this step, only what is not finite is a fault."""
        self.fault, self.cool_until = None, cool_until
        self._bad.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything that later judgements depend on."""
        return {
            "baseline": self.baseline.state_dict(),
            "bad": [list(bad) for bad in self._bad],
            "fault": None if self.fault is None else list(self.fault),
            "cool_until": self.cool_until,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as a saved judge would."""
        self.baseline.load_state_dict(state_dict["baseline"])
        self._bad = [(step, batch) for step, batch in state_dict["bad"]]
        self.fault = None if state_dict["fault"] is None else Fault(*state_dict["fault"])
        self.cool_until = state_dict["cool_until"]

    def _find(self, reason: str) -> None:
        (first_step, first_batch), (last_step, last_batch) = self._bad[0], self._bad[-1]
        reason = reason if self.fault is None else self.fault.reason
        self.fault = Fault(reason, first_step, last_step, first_batch, last_batch)
