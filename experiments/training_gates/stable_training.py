"""G2-4: real training steps, every number of which is finite, and from which the model learns."""

import math

import pandas as pd
from torch import nn

from experiments.training_gates.gate import Gate

LEAST_FALL = 3.0
"""Of the loss from the first tenth of the steps to the last, in standard errors."""

_FINITE = ("loss", "total_loss", "grad_norm")


def stability_gate(table: pd.DataFrame, model: nn.Module, *, steps: int, seconds: float) -> Gate:
    """Whether all steps were trained in one go, with finite numbers and a falling loss.

    Args:
        table: of ``callbacks.read_metrics``.
        model: that was trained.
        steps: that were asked for.
        seconds: of the fit.
    """
    trained = table["step"].tolist()
    bad = sum(int((~table[name].map(math.isfinite)).sum()) for name in _FINITE)
    weights = sum(int((~tensor.isfinite()).sum()) for tensor in model.state_dict().values())
    again = int(table["attempt"].nunique()) - 1
    first, last, fall = _fall(table["loss"])
    return Gate(
        "G2-4",
        f"{len(trained)} of {steps} steps in {seconds:.0f} s, not finite: {bad} losses or gradients and "
        f"{weights} weights; taken back {again} times, loss {first:.3f} -> {last:.3f}, a fall of {fall:.1f} "
        "standard errors",
        f"every step once and in one go, all finite, a fall of more than {LEAST_FALL:g} standard errors",
        trained == list(range(1, steps + 1))
        and bad == 0
        and weights == 0
        and again == 0
        and fall > LEAST_FALL,
    )


def _fall(losses: pd.Series) -> tuple[float, float, float]:
    """Means over the first and the last tenth, and their difference in standard errors."""
    count = max(2, len(losses) // 10)
    first, last = losses.iloc[:count], losses.iloc[-count:]
    difference = float(first.mean() - last.mean())
    error = math.sqrt((first.var() + last.var()) / count)
    if error == 0 or math.isnan(error):
        return float(first.mean()), float(last.mean()), 0.0
    return float(first.mean()), float(last.mean()), difference / error
