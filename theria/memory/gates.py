"""Gates between attention and memory: the gate, the loss that polarises it, its schedule, its statistics."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from theria.memory.accumulator import widened

LOW, HIGH = 0.1, 0.9
"""A gate below the first or above the second has decided."""

SHAPES = ("linear", "cosine", "exponential")


class TokenGate(nn.Module):
    """g = sigmoid(W x + b) in (0, 1), one for every token and head.

    Args:
        width: of x.
        heads: gates a token.
        initial_logit: b at the start; -2 opens a gate to about 0.12.
    """

    def __init__(self, width: int, heads: int, *, initial_logit: float = -2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, heads)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.linear.bias, initial_logit)

    def forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length heads"]:
        """The gates, in float32 (float64 for float64) under autocast too."""
        return torch.sigmoid(widened(self.linear(x)))


def polarization_loss(gates: Float[Tensor, "*gates"]) -> Float[Tensor, ""]:
    """mean(1 - |2 g - 1|): 0 where every gate is 0 or 1, 1 where every gate is a half.

    Its gradient on a gate is +2/n below a half and -2/n above: it drives a gate to the side it is on. Give it
    the gates of the forward pass themselves, not detached ones.
    """
    return (1 - (2 * gates - 1).abs()).mean()


class PolarizationSchedule(nn.Module):
    r"""The weight lambda(t) of the polarisation loss, t being the steps counted so far.

    lambda is ``initial`` over the first ``hold`` of ``steps``, then falls to ``final`` at the last step and
    stays there: with p the part of the fall that is done, by initial + (final - initial) p ("linear"), by the
    same with (1 - cos(pi p)) / 2 for p ("cosine"), or by initial (final / initial)^p ("exponential"). The
    count is a buffer: it is part of a checkpoint, and no value is read back from the device. To do without
    the loss, set ``initial`` and ``final`` to 0 ("linear").

    Args:
        steps: length of the schedule.
        initial, final: weights, at least 0; above 0 for "exponential".
        hold: share of the steps in [0, 1].
        shape: of the fall.

    Attributes:
        step: int64 scalar, the steps counted.

    Raises:
        ValueError: for a value out of range.
    """

    step: Int64[Tensor, ""]

    def __init__(
        self,
        steps: int,
        *,
        initial: float = 10.0,
        final: float = 0.1,
        hold: float = 0.1,
        shape: str = "exponential",
    ) -> None:
        super().__init__()
        if shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, received {shape!r}")
        if steps < 1 or not 0 <= hold <= 1:
            raise ValueError(f"steps must be at least 1 and hold in [0, 1], received {steps} and {hold}")
        if min(initial, final) < 0 or (shape == "exponential" and min(initial, final) == 0):
            raise ValueError(
                "initial and final must be at least 0, and above 0 for shape 'exponential', received "
                f"{initial} and {final} with shape {shape!r}"
            )
        self.steps, self.initial, self.final, self.hold, self.shape = steps, initial, final, hold, shape
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def weight(self) -> Float[Tensor, ""]:
        """lambda at the present step, float32, on the buffer's device."""
        held = self.hold * self.steps
        # a schedule that only holds falls in one step
        part = ((self.step.float() - held) / max(self.steps - held, 1.0)).clamp(0, 1)
        if self.shape == "exponential":
            return self.initial * torch.exp(part * math.log(self.final / self.initial))
        if self.shape == "cosine":
            part = (1 - torch.cos(math.pi * part)) / 2
        # filled on the device: a tensor made of a number would be copied there, and waited for
        return torch.lerp(part.new_full((), self.initial), part.new_full((), self.final), part)

    def advance(self) -> None:
        """Count a step."""
        self.step += 1


class GateStatistics(NamedTuple):
    """Statistics over gates, each a scalar tensor on their device.

    Attributes:
        mean, std: over all gates.
        low, high: shares below 0.1 and above 0.9.
        token_std: mean over heads of the standard deviation over tokens; 0 where a gate ignores its token.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    token_std: Tensor

    @property
    def polarized_ratio(self) -> Tensor:
        """The share of gates that have decided, below 0.1 or above 0.9."""
        return self.low + self.high


def gate_statistics(gates: Float[Tensor, "*layers batch length heads"]) -> GateStatistics:
    """Statistics of the gates of some tokens, detached, with no value read back from the device."""
    gates = gates.detach()
    return GateStatistics(
        mean=gates.mean(),
        std=gates.std(correction=0),
        low=(gates < LOW).to(gates.dtype).mean(),
        high=(gates > HIGH).to(gates.dtype).mean(),
        token_std=gates.std(dim=(-3, -2), correction=0).mean(),
    )


def gate_faults(
    baseline: GateStatistics,
    current: GateStatistics,
    *,
    closed_below: float = 0.01,
    open_above: float = 0.99,
    least_token_std: float = 1e-3,
    least_gain: float = 0.0,
) -> tuple[str, ...]:
    """What is wrong with gates that are compared with an earlier baseline; empty where nothing is.

    Reads the values, so it waits for their device.

    Args:
        baseline, current: statistics of early gates, and of the gates to judge.
        closed_below: a mean gate under which the memory is never read.
        open_above: a mean gate over which attention is never read.
        least_token_std: spread over tokens under which the gates do not depend on their tokens.
        least_gain: how much ``polarized_ratio`` must have risen; 0 asks that it has not fallen.
    """
    mean, spread = float(current.mean), float(current.token_std)
    if not all(math.isfinite(float(value)) for value in current):
        return ("the gates are not finite",)
    faults = []
    if mean < closed_below:
        faults.append(f"the gates are closed: mean {mean:.4f} < {closed_below}, the memory is not read")
    if mean > open_above:
        faults.append(f"the gates are open: mean {mean:.4f} > {open_above}, attention is not read")
    if spread < least_token_std:
        faults.append(
            f"the gates do not depend on their tokens: spread over tokens {spread:.2g} < {least_token_std:g}"
        )
    gain = float(current.polarized_ratio) - float(baseline.polarized_ratio)
    if gain < least_gain:
        faults.append(
            f"the gates do not polarise: the share below {LOW} or above {HIGH} changed by {gain:+.3f} since "
            f"the baseline, expected at least {least_gain:+.3f}"
        )
    return tuple(faults)
