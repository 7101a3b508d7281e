"""Per-step scalars that stay on the device until a block of steps is read in one transfer."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Rows = list[dict[str, float]]

_EXACT_IN_FLOAT32 = (torch.bool, torch.uint8, torch.int8, torch.int16)


class StepMetrics:
    """A buffer of ``capacity`` steps: appending never waits for the device, flushing waits once.

    Tensors of a step are written by one kernel into one row of a (capacity, columns) tensor on their
    device; plain numbers (seconds, a learning rate) stay on the host. The tensor is float32, or wider where
    the first step brings a wider type, so a flushed value equals the appended one exactly.

    The names of the first step are the columns. A copy of a buffer, pickled or deep, starts out empty and
    without subscribers.

    Args:
        capacity: steps held before the buffer flushes itself.

    Attributes:
        reduce: where several ranks train, maps the tensors' (steps, columns) block to the same block over all
            ranks; then every rank has to flush at the same places. None keeps each rank's own values. Plain
            numbers are always a rank's own.

    Raises:
        ValueError: ``capacity`` is not a positive integer.
    """

    def __init__(self, capacity: int = 100) -> None:
        self._capacity = _positive(capacity)
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self._names: tuple[str, ...] = ()
        self._tensor_names: tuple[str, ...] = ()
        self._block: Tensor | None = None
        self._pending: Rows = []
        self._last: dict[str, float] = {}
        self._subscribers: list[Callable[[Rows], None]] = []

    def __reduce__(self) -> tuple[type["StepMetrics"], tuple[int]]:
        return type(self), (self.capacity,)

    def __len__(self) -> int:
        """Number of steps waiting to be flushed."""
        return len(self._pending)

    @property
    def capacity(self) -> int:
        """Steps held before the buffer flushes itself; setting it flushes what is waiting."""
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: int) -> None:
        self._capacity = _positive(capacity)
        self.flush()
        self._block = None

    @property
    def last(self) -> dict[str, float]:
        """The most recent flushed row, empty before the first flush."""
        return dict(self._last)

    def subscribe(self, receive: Callable[[Rows], None]) -> None:
        """Hand every flushed block to ``receive``; subscribing twice is subscribing once."""
        if receive not in self._subscribers:
            self._subscribers.append(receive)

    def unsubscribe(self, receive: Callable[[Rows], None]) -> None:
        """Stop handing blocks to ``receive``; one that is not subscribed is left alone."""
        if receive in self._subscribers:
            self._subscribers.remove(receive)

    def append(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Add the scalars of one step, without waiting for the device unless the buffer is now full.

        Args:
            step: number of finished optimiser steps, this one included.
            values: 0-dimensional tensors, all on one device, and plain numbers.

        Raises:
            TypeError: ``step`` is not an int.
            ValueError: no values, other names than the first step's, a column that changed between tensor and
                number, the reserved name "step", a tensor with dimensions, or tensors on several devices.
        """
        if not isinstance(step, int):
            raise TypeError(
                f"step must be an int, got {type(step).__name__}; a tensor would wait for the device"
            )
        if not self._names:
            self._fix_columns(values)
        tensors = self._checked_tensors(values)
        if tensors:
            block = self._block_for(tensors)
            with torch.no_grad():
                torch.stack(tensors, out=block[len(self._pending)])
        row: dict[str, float] = {"step": step}
        for name in self._names:
            value = values[name]
            row[name] = float("nan") if isinstance(value, Tensor) else float(value)
        self._pending.append(row)
        if len(self._pending) == self.capacity:
            self.flush()

    def latest(self, name: str, step: int) -> Tensor | float | None:
        """A value of the newest step, on its device if it is not flushed; None if that is not ``step``."""
        if self._pending:
            row = self._pending[-1]
            if row["step"] == step and name in self._tensor_names and self._block is not None:
                return self._block[len(self._pending) - 1, self._tensor_names.index(name)]
        else:
            row = self._last
        return row.get(name) if row.get("step") == step else None

    def flush(self, *, reduce: bool = True) -> None:
        """Bring the waiting rows to the host in one transfer and hand them, in order, to every subscriber.

        Each row is ``{"step": int, <name>: float, ...}``. The buffer is empty before the first subscriber
        is called, so a subscriber that fails or flushes again cannot make a row appear twice; each subscriber
        gets its own copy.

        Args:
            reduce: False leaves ``self.reduce`` out, for a rank that flushes while others may not.
        """
        rows, self._pending = self._pending, []
        if not rows:
            return
        if self._block is not None:
            block = self._block[: len(rows)]
            if reduce and self.reduce is not None:
                block = self.reduce(block)
            for row, numbers in zip(rows, block.tolist(), strict=True):
                row.update(zip(self._tensor_names, numbers, strict=True))
        self._last = rows[-1]
        for receive in tuple(self._subscribers):
            receive([dict(row) for row in rows])

    def _fix_columns(self, values: Mapping[str, Tensor | float]) -> None:
        if not values or "step" in values:
            raise ValueError(f"a step needs metrics, none of them named 'step'; got the names {list(values)}")
        self._names = tuple(values)
        self._tensor_names = tuple(name for name, value in values.items() if isinstance(value, Tensor))

    def _checked_tensors(self, values: Mapping[str, Tensor | float]) -> list[Tensor]:
        if values.keys() != set(self._names):
            missing, unexpected = (
                sorted(set(self._names) - set(values)),
                sorted(set(values) - set(self._names)),
            )
            raise ValueError(
                f"metrics must keep the names of the first step: missing {missing}, unexpected {unexpected}"
            )
        found = {name: value for name in self._names if isinstance(value := values[name], Tensor)}
        if tuple(found) != self._tensor_names:
            changed = sorted(set(found).symmetric_difference(self._tensor_names))
            raise ValueError(
                f"metrics {changed} changed between tensor and plain number since the first step"
            )
        shaped = {name: tuple(value.shape) for name, value in found.items() if value.ndim}
        if shaped:
            raise ValueError(f"metrics must be 0-dimensional tensors, got shapes {shaped}")
        if len({value.device for value in found.values()}) > 1:
            devices = {name: str(value.device) for name, value in found.items()}
            raise ValueError(
                f"metrics of a step must be on one device, got {devices}; pass host values as numbers"
            )
        return list(found.values())

    def _block_for(self, tensors: list[Tensor]) -> Tensor:
        device = tensors[0].device
        if self._block is not None and self._block.device != device:
            self.flush()
            self._block = None
        if self._block is None:
            # A tensor made inside inference mode could not be written outside of it.
            with torch.inference_mode(False):
                dtype = functools.reduce(torch.promote_types, map(_exact_float, tensors))
                self._block = torch.empty(self.capacity, len(tensors), dtype=dtype, device=device)
        return self._block


def _positive(capacity: int) -> int:
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise ValueError(f"capacity must be a positive integer, got {capacity!r}")
    return capacity


def _exact_float(value: Tensor) -> torch.dtype:
    """The narrowest type of at least float32 that holds every value of this tensor's type."""
    if value.dtype.is_floating_point:
        return torch.promote_types(value.dtype, torch.float32)
    return torch.float32 if value.dtype in _EXACT_IN_FLOAT32 else torch.float64
