"""The files of the checkpoints that training goes back to."""

from pathlib import Path

from lightning.pytorch import Trainer

from callbacks.rollback_ring import RollbackRing


class RollbackCheckpoints:
    """A ring of checkpoints in a directory: `rollback_<step>.ckpt`.

    Args:
        ring: which of them there are, and which are healthy.

    Attributes:
        directory: where they stand; to be set before anything else is called.
        is_writing: whether one is being written, which callbacks may add to.
    """

    directory: Path

    def __init__(self, ring: RollbackRing) -> None:
        self.ring = ring
        self.is_writing = False

    def path(self, step: int) -> Path:
        """The file of a step's checkpoint."""
        return self.directory / f"rollback_{step:06d}.ckpt"

    def forget_missing(self, trainer: Trainer) -> None:
        """Leave out of the ring what rank zero does not find."""
        there = [step for step in self.ring.steps if self.path(step).is_file()]
        self.ring.keep_only(trainer.strategy.broadcast(there))

    def save(self, trainer: Trainer, step: int, *, trusted: bool = False) -> None:
        """Write one, then remove those that the ring drops for it."""
        self.is_writing = True
        try:
            trainer.save_checkpoint(self.path(step), weights_only=False)
        finally:
            self.is_writing = False
        self.remove(trainer, self.ring.add(step, trusted=trusted))

    def remove(self, trainer: Trainer, steps: list[int]) -> None:
        """Delete the files of these steps."""
        if trainer.is_global_zero:
            for step in steps:
                trainer.strategy.remove_checkpoint(self.path(step))
