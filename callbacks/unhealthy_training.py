"""What comes of training that broke: it is taken back, or it ends."""

from pathlib import Path
from typing import NamedTuple

from callbacks.training_health import Fault


class Rollback(NamedTuple):
    """What was taken back.

    Attributes:
        fault: that was found.
        step: at which training stood when it was acted upon.
        target: step of the checkpoint that training went back to.
    """

    fault: Fault
    step: int
    target: int


class UnhealthyTrainingError(RuntimeError):
    """Training broke and is not taken back any more; ``checkpoint`` is the last healthy one, or None."""

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
