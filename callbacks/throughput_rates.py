"""Batches and samples a second."""

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor


class ThroughputRates(ThroughputMonitor):
    """Lightning's monitor for the batches of this application: tasks or sequences a second, and batches.

    Tags are `train/device/batches_per_sec`, `train/device/samples_per_sec`, `train/time` and so on, and the
    same of `validate`, means over a window of batches. On CUDA it waits for the device at every batch.

    It says nothing of operations: ``MemoryLM`` counts its own, and logs perf/mfu without this callback.

    Args:
        window_size: batches of the means.
    """

    def __init__(self, window_size: int = 50) -> None:
        super().__init__(batch_size_fn=samples_of, window_size=window_size)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do without operations, of which Lightning would ask for one number for training and validation."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FLOPs not found|.*does not support")
            super().setup(trainer, pl_module, stage)
        self._module_has_flops = False


def samples_of(batch: Any) -> int:
    """Tasks or sequences of a batch, whose tensors all begin with that dimension."""
    return len(batch[0])
