"""Optimiser steps that do not happen where their gradient is not finite."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from callbacks.sharded_parameters import own_part

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def largest_gradient(optimizer: Optimizer) -> Tensor | None:
    """The largest absolute entry of all gradients; NaN where one is NaN, None without gradients.

    Of gradients divided over ranks it is that of all ranks, each of which has to ask.
    """
    gradients = [gradient for p in _with_gradient(optimizer) if (gradient := p.grad) is not None]
    if not gradients:
        return None
    parts = [part for gradient in gradients if (part := own_part(gradient)).numel()]
    # what torch.nn.utils.get_total_norm does for gradients on one device, in three quarters of its time
    largest = torch.stack(torch._foreach_norm(parts, torch.inf)).max()
    if not isinstance(gradients[0], DTensor):
        return largest
    of_ranks = [torch.empty_like(largest) for _ in range(distributed.get_world_size())]
    distributed.all_gather(of_ranks, largest)  # unlike a maximum by the communication library, NaN stays NaN
    return torch.stack(of_ranks).max()


class UpdateGuard:
    """Refuses single steps of an optimiser: parameters and the optimiser's state stay as they were.

    Where the flag is on the host, the gradients are taken away, which every optimiser of torch reads as
    nothing to do. A flag on another device is not read: fused Adam and AdamW take it as they take a gradient
    scaler's, and for any other the update is undone on the device (one more copy of parameters and state a
    step, in a few launches for all of them; a step counter that an optimiser keeps on the host moves on all
    the same). Fused SGD is among the others, because torch leaves its momentum uninitialised where its first
    step is refused.

    Args:
        optimizer: whose steps to guard, until ``release``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._refused: Tensor | None = None
        self._before: dict[Tensor, Tensor] = {}
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def refuse_if(self, refused: Tensor) -> None:
        """Refuse the step that is about to be taken if this 0-dimensional boolean tensor is true."""
        if refused.device.type == "cpu":
            if refused.item():
                for parameter in _with_gradient(self.optimizer):
                    parameter.grad = None
        else:
            self.refuse_on_device_if(refused)

    def refuse_on_device_if(self, refused: Tensor) -> None:
        """As ``refuse_if``, without reading the flag."""
        self._refused = refused
        takes_flag = isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW) and not any(
            isinstance(parameter, DTensor) for parameter in _with_gradient(self.optimizer)
        )
        if takes_flag and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = refused.to(torch.float32)  # type: ignore[attr-defined]
        else:
            tensors = self._tensors(refused.device)
            parts = [own_part(tensor.detach()) for tensor in tensors]
            copies = [torch.empty_like(part) for part in parts]
            if parts:
                torch._foreach_copy_(copies, parts)
            self._before = dict(zip(tensors, copies, strict=True))

    def release(self) -> None:
        """Stop guarding."""
        self._hook.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._refused is None:
            return
        refused, self._refused = self._refused, None
        if hasattr(optimizer, "found_inf"):
            del optimizer.found_inf
            return
        before, self._before = self._before, {}
        pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for tensor in self._tensors(refused.device):
            part = own_part(tensor.detach())
            old = before.get(tensor)
            # what the step has made itself started from zeros
            bits = _bits(part)
            pairs[bits.dtype].append((bits, torch.zeros_like(bits) if old is None else _bits(old)))
        for dtype, both in pairs.items():
            # as integers, whose sums wrap around: new = old + (new - old) to the bit, whatever is not finite
            new, old_bits = map(list, zip(*both, strict=True))
            torch._foreach_sub_(new, old_bits)
            torch._foreach_mul_(new, (~refused).to(dtype))
            torch._foreach_add_(new, old_bits)

    def _tensors(self, device: torch.device) -> list[Tensor]:
        """The parameters that have a gradient, and what the optimiser keeps of them on this device."""
        found: list[Tensor] = []
        for parameter in _with_gradient(self.optimizer):
            state = self.optimizer.state.get(parameter, {})
            kept = (value for value in state.values() if isinstance(value, Tensor))
            found += [parameter, *(value for value in kept if value.device == device)]
        return found


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.element_size()])


def _with_gradient(optimizer: Optimizer) -> list[Tensor]:
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
