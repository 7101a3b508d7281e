"""G2-7: every record tells how its perplexity stands to the baseline, and a reader comes to the same."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from experiments.training_gates.gate import Gate

LARGEST_EXPONENT = 20.0
TOLERANCE = 1e-6


class Recomputed(NamedTuple):
    """``ppl_delta`` of every step from the losses alone.

    Attributes:
        ppl_delta: by step.
        absorbed: whether the baseline took the step up.
    """

    ppl_delta: list[float]
    absorbed: list[bool]


def recompute(
    losses: Sequence[float], recorded: Sequence[float], *, threshold: float, baseline_steps: int
) -> Recomputed:
    """What ``ppl_delta`` has to be: (p - ema) / ema with p = exp(min(loss, 20)).

    ema is the mean of p so far, and moves by 2 / (baseline_steps + 1) of its distance to p once that is more.
    A step above the threshold may be an outlier, which the baseline does not take up; whether it was one is
    read from the record of the next step, of the two that are possible.
    """
    deltas: list[float] = []
    absorbed: list[bool] = []
    # (ema, steps in it) if the last step was taken up, and if it was not
    possible = [(math.nan, 0)]
    for loss, record in zip(losses, recorded, strict=True):
        p = math.exp(min(loss, LARGEST_EXPONENT))
        candidates = [(p - ema) / ema if count else 0.0 for ema, count in possible]
        chosen = min(range(len(candidates)), key=lambda index: abs(candidates[index] - record))
        ema, count = possible[chosen]
        deltas.append(candidates[chosen])
        absorbed.append(chosen == 0)
        rate = max(1 / (count + 1), 2 / (baseline_steps + 1))
        taken_up = (ema + rate * (p - ema) if count else p, count + 1)
        possible = [taken_up, (ema, count)] if candidates[chosen] > threshold else [taken_up]
    return Recomputed(deltas, absorbed[1:])


def telemetry_gate(
    table: pd.DataFrame, *, steps: int, loss: str, threshold: float, baseline_steps: int
) -> Gate:
    """Whether all records have what the losses beside it say.

    Args:
        table: of ``callbacks.read_metrics``.
        steps: of the run.
        loss: column of the loss that is judged.
        threshold, baseline_steps: of the callback that judges.
    """
    bar = (
        f"in every step's record, finite, within {TOLERANCE:g} of what the losses say, is_spike above "
        f"{threshold:g} and nowhere else"
    )
    missing = [name for name in ("ppl_delta", "is_spike", loss) if name not in table]
    if missing:
        return Gate("G2-7", f"no {', '.join(missing)} in the records", bar, False)
    recorded = table["ppl_delta"].astype(float).tolist()
    finite = [math.isfinite(value) for value in recorded]
    if not all(finite) or not all(table[loss].map(math.isfinite)):
        return Gate("G2-7", f"{sum(finite)} of {steps} records have a finite one", bar, False)
    found = recompute(table[loss].tolist(), recorded, threshold=threshold, baseline_steps=baseline_steps)
    off = max(
        abs(expected - record) / (1 + abs(expected))
        for expected, record in zip(found.ppl_delta, recorded, strict=True)
    )
    spikes = [delta > threshold for delta in found.ppl_delta]
    wrong = sum(spike != flag for spike, flag in zip(spikes, table["is_spike"].map(bool), strict=True))
    return Gate(
        "G2-7",
        f"{len(recorded)} of {steps} records have it, largest difference from the losses {off:.1e}, "
        f"{sum(spikes)} above {threshold:g}, {found.absorbed.count(False)} of them not taken up, "
        f"is_spike wrong in {wrong}",
        bar,
        table["step"].tolist() == list(range(1, steps + 1)) and off <= TOLERANCE and wrong == 0,
    )
