"""What a training process of the scaling benchmark writes down about itself."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from theria.provenance import device_name

_KIB = 2**10


class StepClock(Callback):
    """Times training in blocks of steps, at whose ends the device is waited for.

    Each process leaves ``rank_N.json`` in ``folder``: seconds of every block, its name for its device, and
    the most bytes that it held at once (on CUDA of the allocator, elsewhere of the process).

    Args:
        folder: of the files.
        block: steps of a block.
        warm_up: steps before the first block.
        last: step after which no block ends any more.
    """

    def __init__(self, folder: str, block: int, warm_up: int, last: int) -> None:
        self.folder = Path(folder)
        self.block = block
        self.warm_up = warm_up
        self.last = last
        self._seconds: list[float] = []
        self._started = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a block, wait for the device and look at the clock."""
        step = trainer.global_step
        if not self.warm_up <= step <= self.last or (step - self.warm_up) % self.block:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if step > self.warm_up:
            self._seconds.append(now - self._started)
        self._started = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        device = pl_module.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            peak = _KIB * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {"seconds": self._seconds, "device": device_name(device), "peak_bytes": peak}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(found), encoding="utf-8")
