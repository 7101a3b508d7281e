"""Memory of the CUDA caching allocator while training runs."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.intervals import checked_interval
from callbacks.loop_state import log_values, logging_step

_MIB = 2**20


class CUDAMemoryStats(Callback):
    """Logs the allocator's memory on rank zero's device every n steps, in MiB.

    - ``cuda/allocated_mib``: held by live tensors;
    - ``cuda/reserved_mib``: taken from the device, live or cached;
    - ``cuda/peak_mib``: the most that was allocated at once since the last report (the first: since training
      began). Each report resets the allocator's peak, for other readers too.

    The numbers are kept on the host, so reading them does not wait for the device. Where training does not
    run on CUDA the callback says so once and does nothing.

    Args:
        every_n_steps: optimiser steps between two reports.

    Raises:
        TypeError, ValueError: ``every_n_steps`` is not a positive integer.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = checked_interval(every_n_steps)
        self._device: torch.device | None = None
        self._last_step = 0
        self._said_idle = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the device and let the first peak begin here."""
        device = trainer.strategy.root_device
        self._device = device if device.type == "cuda" else None
        self._last_step = trainer.global_step
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif not self._said_idle:
            self._said_idle = True
            rank_zero_info(f"{type(self).__name__}: training runs on {device}, no CUDA memory to log")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report when the number of finished optimiser steps passes a multiple of n."""
        last_step, self._last_step = self._last_step, trainer.global_step
        if self._device is None or self._last_step // self.every_n_steps == last_step // self.every_n_steps:
            return
        metrics = {
            "cuda/allocated_mib": torch.cuda.memory_allocated(self._device) / _MIB,
            "cuda/reserved_mib": torch.cuda.memory_reserved(self._device) / _MIB,
            "cuda/peak_mib": torch.cuda.max_memory_allocated(self._device) / _MIB,
        }
        torch.cuda.reset_peak_memory_stats(self._device)
        log_values(trainer, metrics, logging_step(trainer))
