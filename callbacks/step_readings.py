"""Numbers of each step, brought from the device to the host without stopping either."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """What is known of a finished step.

    Attributes:
        step: its number.
        batch: number of its first batch in the training stream.
        values: the numbers.
    """

    step: int
    batch: int
    values: list[float]


class _OnItsWay(NamedTuple):
    step: int
    batch: int
    values: Tensor
    copied: torch.cuda.Event | None


class StepReadings:
    """A queue of device tensors that are read ``lag`` steps after they were put in.

    On CUDA the copy to the host is queued behind the step, and is waited for when the next step has been
    queued as well: the device is never without work. Elsewhere the numbers are there at once.

    Args:
        lag: steps between the end of a step and its reading; 1 on CUDA, 0 where reading costs nothing.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._queue: deque[_OnItsWay] = deque()

    def put(self, step: int, batch: int, values: Tensor) -> None:
        """Add a step's numbers, (numbers,)."""
        copied = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            values = host
        self._queue.append(_OnItsWay(step, batch, values, copied))

    def due(self) -> Iterator[Reading]:
        """Take out every step but the newest ``lag``."""
        yield from self._take(self.lag)

    def all(self) -> Iterator[Reading]:
        """Take out every step, waiting for the device."""
        yield from self._take(0)

    def clear(self) -> None:
        """Forget what has not been read."""
        self._queue.clear()

    def _take(self, left: int) -> Iterator[Reading]:
        while len(self._queue) > left:
            step, batch, values, copied = self._queue.popleft()
            if copied is not None:
                copied.synchronize()
            yield Reading(step, batch, values.tolist())
