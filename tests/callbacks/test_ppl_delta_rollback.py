"""Faults in short trainings: what goes back, to where, what is skipped, and what must not change."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from callbacks import (
    PPLDeltaRollback,
    ResumableCheckpoint,
    RNGState,
)
from datamodules.loader import BatchIndex, ResumableLoader, Shard
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.step_metrics import StepMetrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),  # made on the spot
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:training goes back from step:UserWarning"),  # what is tested here
]

EPOCH = 20
LAST_STEP = 70
Fault = Callable[[int, Tensor], Tensor]


class Points(Dataset[tuple[int, Tensor, Tensor]]):
    """Batches of a noisy linear relation, numbered through the epochs."""

    def __getitem__(self, index: BatchIndex) -> tuple[int, Tensor, Tensor]:
        number = index.epoch * EPOCH + index.ids.start // 8
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 3, generator=generator)
        noise = 0.1 * torch.randn(8, generator=generator)
        return number, x, x @ torch.tensor([1.0, -2.0, 0.5]) + noise


def loader() -> ResumableLoader:
    return ResumableLoader(Points(), Shard(8 * EPOCH, 8))


class Module(LightningModule):
    """Fits the relation; `fault(number, loss)` may change the loss of a batch. `seen` has (step, batch)."""

    def __init__(self, fault: Fault | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.dropout = torch.nn.Dropout(0.2)  # draws from the global generator
        self.fault = fault or (lambda number, loss: loss)
        self.seen: list[tuple[int, int]] = []
        self.rates: list[float] = []

    def loss(self, batch: tuple[int, Tensor, Tensor]) -> Tensor:
        number, x, y = batch
        self.seen.append((self.trainer.global_step, int(number)))
        random.random()
        np.random.random()  # noqa: NPY002  # the global generator is restored too
        loss = (self.layer(x + 0.01 * self.dropout(x)).squeeze(-1) - y).square().mean()
        return self.fault(int(number), loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Automatic(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Manual(Module):
    """Keeps its rows in a buffer, as MetaSeqClassifier does."""

    def __init__(self, fault: Fault | None = None) -> None:
        super().__init__(fault)
        self.automatic_optimization = False
        self.step_metrics = StepMetrics(10)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.record(loss)

    def record(self, loss: Tensor) -> None:
        self.step_metrics.append(self.trainer.global_step, {"loss": loss.detach()})


class Logging(Manual):
    """Has no buffer, only `self.log`."""

    def __init__(self, fault: Fault | None = None) -> None:
        super().__init__(fault)
        del self.step_metrics

    def record(self, loss: Tensor) -> None:
        self.log("loss", loss)


MODULES = pytest.mark.parametrize("module_class", [Automatic, Manual, Logging])


def spiking(*numbers: int, factor: float = 50.0) -> Fault:
    """The loss of these batches is many times larger."""
    return lambda number, loss: loss * factor + 3.0 if number in numbers else loss


def once(fault: Fault) -> Fault:
    """The fault of a batch does not return when the batch does."""
    done: set[int] = set()

    def change(number: int, loss: Tensor) -> Tensor:
        if number in done:
            return loss
        changed = fault(number, loss)
        if changed is not loss:
            done.add(number)
        return changed

    return change


def healer(**options: Any) -> PPLDeltaRollback:
    defaults = {
        "every_n_steps": 10,
        "healthy_after": 5,
        "baseline_steps": 10,
        "warm_up": 8,
        "skip_window": 2,
        "cool_down": 0,
        "threshold": 0.2,
        "z_limit": 12.0,
    }
    return PPLDeltaRollback(**(defaults | options))


def train(
    directory: Path, module: LightningModule, *callbacks: Callback, steps: int = LAST_STEP, **options: Any
) -> Trainer:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    ckpt_path, data = options.pop("ckpt_path", None), options.pop("data", None)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ResumableCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": steps,
        "max_epochs": -1,
        "plugins": [AtomicCheckpointIO()],
    }
    trainer = Trainer(default_root_dir=directory, callbacks=list(callbacks), **(defaults | options))
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    return trainer


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that a training goes on from."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return {
        "weights": checkpoint["state_dict"],
        "optimizers": checkpoint["optimizer_states"],
        "schedulers": checkpoint["lr_schedulers"],
        "generators": RNGState().state_dict(),
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "logged": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "batches": trainer.fit_loop.epoch_loop.batch_progress.state_dict(),
    }


def rolled_back(callback: PPLDeltaRollback, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(bad step, target) of every rollback, filled while training runs."""
    found: list[tuple[int, int]] = []
    original = callback._roll_back

    def roll_back(trainer: Trainer, target: int) -> None:
        assert callback._health.fault is not None
        found.append((callback._health.fault.first_step, target))
        original(trainer, target)

    monkeypatch.setattr(callback, "_roll_back", roll_back)
    return found


@MODULES
@pytest.mark.parametrize("with_workers", [False, True])
def test_with_nothing_to_skip_the_weights_of_an_undisturbed_run_come_back_bit_for_bit(
    tmp_path: Path, module_class: type[Module], with_workers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across an epoch's end, with dropout and a schedule."""
    if with_workers and module_class is not Automatic:
        pytest.skip("one kind is enough for the loader")
    undisturbed = train(tmp_path / "plain", module_class())
    callback = healer(skip_window=0)
    found = rolled_back(callback, monkeypatch)
    data = ResumableLoader(Points(), Shard(8 * EPOCH, 8), num_workers=int(with_workers))
    module = module_class(once(spiking(44, 45)))
    healed = train(tmp_path / "healed", module, RNGState(), callback, data=data)
    assert found == [(45, 30)]
    torch.testing.assert_close(everything(healed), everything(undisturbed), rtol=0, atol=0)
    assert module.seen[:46] == [(step, step) for step in range(46)]
    assert module.seen[46:] == [(step, step) for step in range(30, LAST_STEP)]
