"""What weight decay leaves alone, and the learning rate over a run."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weights of linear maps, and all others, which do not decay.

    The others are biases, norms, embeddings, persistent memories, scales and the taps of convolutions: where
    they stand says something that a pull towards zero would undo.
    """
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if id(parameter) in linear]
    kept = [parameter for parameter in parameters if id(parameter) not in linear]
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


class WarmupCosine(LRScheduler):
    r"""A linear rise over the first steps, then half a cosine down to a share of the rate, which then stays.

    With w = warmup_steps, T = total_steps and s the steps done, the rate is the configured one times

    .. math::
        \frac{s + 1}{w} \;\; (s < w), \qquad
        f + (1 - f) \frac{1 + \cos(\pi p)}{2}, \;\; p = \min\Bigl(1, \frac{s - w}{T - w}\Bigr) \;\; (s \ge w)

    Args:
        optimizer: whose rates are scheduled.
        warmup_steps: steps of the rise, 0 for none.
        total_steps: step at which the cosine ends, above warmup_steps.
        final_share: f, of the configured rate, in [0, 1].

    Raises:
        ValueError: for values that make no schedule.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 50,
        total_steps: int = 1000,
        final_share: float = 0.1,
    ) -> None:
        if not 0 <= warmup_steps < total_steps or not 0 <= final_share <= 1:
            raise ValueError(
                "expected 0 <= warmup_steps < total_steps and final_share in [0, 1], got "
                f"{warmup_steps}, {total_steps} and {final_share}"
            )
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_share = final_share
        super().__init__(optimizer)

    # LRScheduler declares tensors too, for rates that a captured graph reads; ours are numbers
    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Rates of the parameter groups for the next step."""
        return [float(rate) * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """What the configured rate is multiplied by after so many steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        part = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * part)) / 2
