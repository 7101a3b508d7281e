"""Which checkpoints a rollback may go back to."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass
class Snapshot:
    """A checkpoint of the ring.

    Attributes:
        step: optimiser steps behind it.
        good_steps: good ones that have followed it without a bad one between.
    """

    step: int
    good_steps: int = 0


class RollbackRing:
    """The newest checkpoints and what followed each of them.

    A checkpoint is known to be healthy, and may be gone back to, once ``healthy_after`` good steps have
    followed it in a row; before that, what broke training may already be inside of it. A bad step starts the
    count of those that are not known to be healthy again.

    Args:
        size: checkpoints to keep; the newest healthy one is kept beyond it.
        healthy_after: good steps that make a checkpoint a target.
    """

    def __init__(self, size: int, healthy_after: int) -> None:
        self.size = size
        self.healthy_after = healthy_after
        self._snapshots: list[Snapshot] = []

    @property
    def steps(self) -> list[int]:
        """Of all checkpoints, ascending."""
        return [snapshot.step for snapshot in self._snapshots]

    @property
    def target(self) -> int | None:
        """Step of the newest checkpoint known to be healthy."""
        healthy = [snapshot.step for snapshot in self._snapshots if self._is_healthy(snapshot)]
        return max(healthy, default=None)

    def add(self, step: int, *, trusted: bool = False) -> list[int]:
        """Take a new checkpoint in, one before any training at once as healthy; the steps that have to go."""
        self._snapshots.append(Snapshot(step, self.healthy_after if trusted else 0))
        newest, target = self.steps[-self.size :], self.target
        return self._keep(lambda snapshot: snapshot.step in newest or snapshot.step == target)

    def observe(self, step: int, *, good: bool) -> None:
        """Count a step for the checkpoints before it."""
        for snapshot in self._snapshots:
            if snapshot.step < step and not self._is_healthy(snapshot):
                snapshot.good_steps = snapshot.good_steps + 1 if good else 0

    def drop_after(self, step: int) -> list[int]:
        """Forget the checkpoints of later steps; which they were."""
        return self._keep(lambda snapshot: snapshot.step <= step)

    def keep_only(self, steps: list[int]) -> None:
        """Forget all other checkpoints."""
        self._keep(lambda snapshot: snapshot.step in steps)

    def state_dict(self) -> dict[str, Any]:
        """Steps and counts."""
        return {"snapshots": [list(dataclasses.astuple(snapshot)) for snapshot in self._snapshots]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved ring."""
        self._snapshots = [Snapshot(*values) for values in state_dict["snapshots"]]

    def _is_healthy(self, snapshot: Snapshot) -> bool:
        return snapshot.good_steps >= self.healthy_after

    def _keep(self, is_kept: Callable[[Snapshot], bool]) -> list[int]:
        gone = [snapshot.step for snapshot in self._snapshots if not is_kept(snapshot)]
        self._snapshots = [snapshot for snapshot in self._snapshots if is_kept(snapshot)]
        return gone
