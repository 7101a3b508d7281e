import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from callbacks import CUDAMemoryStats

MIB = 2**20

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers:UserWarning"
    ),  # a few numbers need no workers
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]


class Tiny(LightningModule):
    """Allocates a scratch tensor of ``scratch`` MiB in the batches named by their index."""

    def __init__(self, scratch: dict[int, int] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.scratch = scratch or {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx in self.scratch:
            torch.empty(self.scratch[batch_idx] * MIB, dtype=torch.uint8, device=self.device)
        return (self.weight - batch[0].mean()).square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FakeAllocator:
    """Stands in for torch.cuda's counters: each batch allocates more, the peak is the last since a reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        self.devices: set[torch.device] = set()
        for name, read in {
            "memory_allocated": lambda: self.allocated,
            "memory_reserved": lambda: 2 * self.allocated,
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": self.reset,
        }.items():
            monkeypatch.setattr(torch.cuda, name, self.on_device(read))

    def on_device(self, read: Any) -> Any:
        def call(device: torch.device) -> int:
            self.devices.add(device)
            return read()

        return call

    def reset(self) -> None:
        self.peak = self.allocated

    def use(self, allocated: int, peak: int) -> None:
        self.allocated, self.peak = allocated, max(self.peak, peak)


class Recorder:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


def drive(callback: CUDAMemoryStats, usage: dict[int, tuple[int, int]], allocator: FakeAllocator) -> Recorder:
    """Runs the hooks as a trainer on cuda:1 would; ``usage`` maps steps to MiB (allocated, peak)."""
    recorder = Recorder()
    loop = SimpleNamespace(_batches_that_stepped=0)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", 1)),
        fit_loop=SimpleNamespace(epoch_loop=loop),
        loggers=[recorder],
        global_step=0,
    )
    module: Any = None
    callback.on_train_start(trainer, module)
    for step, (allocated, peak) in usage.items():
        allocator.use(allocated * MIB, peak * MIB)
        trainer.global_step, loop._batches_that_stepped = step, step - 1
        callback.on_train_batch_end(trainer, module, None, None, step - 1)
    return recorder


def test_each_report_holds_the_peak_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    allocator.use(5 * MIB, 900 * MIB)  # before training: no part of the first report
    usage = {1: (10, 70), 2: (20, 20), 3: (30, 30), 4: (40, 45), 5: (50, 500)}
    recorder = drive(CUDAMemoryStats(every_n_steps=2), usage, allocator)
    assert recorder.logged == [
        (1, {"cuda/allocated_mib": 20.0, "cuda/reserved_mib": 40.0, "cuda/peak_mib": 70.0}),
        (3, {"cuda/allocated_mib": 40.0, "cuda/reserved_mib": 80.0, "cuda/peak_mib": 45.0}),
    ]
    assert allocator.devices == {torch.device("cuda", 1)}


def test_steps_that_jump_over_a_multiple_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = dict.fromkeys((3, 6, 9, 12), (1, 1))
    recorder = drive(CUDAMemoryStats(every_n_steps=5), usage, FakeAllocator(monkeypatch))
    assert [step for step, _ in recorder.logged] == [5, 11]


def test_a_batch_that_only_accumulates_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    callback, allocator = CUDAMemoryStats(every_n_steps=2), FakeAllocator(monkeypatch)
    recorder = drive(callback, {2: (1, 1)}, allocator)
    trainer: Any = SimpleNamespace(global_step=2, loggers=[recorder])
    module: Any = None
    callback.on_train_batch_end(trainer, module, None, None, 2)
    assert len(recorder.logged) == 1


def fit(directory: Path, module: LightningModule, callback: CUDAMemoryStats, accelerator: str) -> Path:
    logger = CSVLogger(directory)
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        logger=logger,
        callbacks=[callback],
        max_epochs=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(6)), batch_size=1))
    return Path(logger.log_dir)


def test_on_the_cpu_it_says_so_once_and_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = CUDAMemoryStats(every_n_steps=1)
    with caplog.at_level(logging.INFO):
        directories = [fit(tmp_path, Tiny(), callback, "cpu") for _ in range(2)]
    said = [record.message for record in caplog.records if "CUDAMemoryStats" in record.message]
    assert said == ["CUDAMemoryStats: training runs on cpu, no CUDA memory to log"]
    assert [list(directory.glob("*.csv")) for directory in directories] == [[], []]


@pytest.mark.gpu
def test_on_cuda_a_scratch_tensor_shows_in_the_peak_of_its_own_report(tmp_path: Path) -> None:
    directory = fit(tmp_path, Tiny({1: 64, 4: 256}), CUDAMemoryStats(every_n_steps=2), "gpu")
    logged = pd.read_csv(directory / "metrics.csv").set_index("step")
    assert list(logged.index) == [1, 3, 5]
    above = logged["cuda/peak_mib"] - logged["cuda/allocated_mib"]
    assert above[1] == pytest.approx(64, abs=2)
    assert above[3] < 2
    assert above[5] == pytest.approx(256, abs=2)
    assert (logged["cuda/reserved_mib"] >= logged["cuda/peak_mib"]).all()
