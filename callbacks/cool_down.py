"""Learning rates that are lower for a while, whatever schedulers do with them meanwhile."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class CoolDown:
    """Multiplies the learning rates by a factor inside each optimiser step while it is active.

    Outside of the steps the rates stay what optimiser and scheduler have made of them, and so they do in
    checkpoints.

    Args:
        factor: of the rates; 1 leaves them alone.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.active = False
        self._hooks: list[RemovableHandle] = []
        self._rates: dict[Optimizer, list[Tensor | float]] = {}

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Begin to watch these optimisers' steps."""
        if self.factor == 1:
            return
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Let go of them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._rates = [], {}

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.active:
            self._rates[optimizer] = [
                rate.clone() if isinstance(rate := group["lr"], Tensor) else rate
                for group in optimizer.param_groups
            ]
            for group in optimizer.param_groups:
                _assign(group, group["lr"] * self.factor)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rates = self._rates.pop(optimizer, [])
        for group, rate in zip(optimizer.param_groups, rates, strict=bool(rates)):
            _assign(group, rate)


def _assign(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate)  # a captured graph reads this tensor
    else:
        group["lr"] = rate
