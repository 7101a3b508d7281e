"""Faults in short trainings: what goes back, to where, what is skipped, and what must not change."""

import csv
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from callbacks import (
    ConfiguredOptimizerValues,
    MetricsJSONL,
    PPLDeltaRollback,
    ResumableCheckpoint,
    RNGState,
    UnhealthyTrainingError,
    ppl_delta_rollback,
    read_metrics,
)
from callbacks.refused_update import UpdateGuard
from callbacks.rollback_ring import RollbackRing
from datamodules.loader import BatchIndex, ResumableLoader, Shard
from lightning_modules.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from lightning_modules.loggers import RunCSVLogger
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
        self.losses: list[float] = []

    def loss(self, batch: tuple[int, Tensor, Tensor]) -> Tensor:
        number, x, y = batch
        self.seen.append((self.trainer.global_step, int(number)))
        random.random()
        np.random.random()  # noqa: NPY002  # the global generator is restored too
        loss = (self.layer(x + 0.01 * self.dropout(x)).squeeze(-1) - y).square().mean()
        loss = self.fault(int(number), loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Automatic(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Plateau(Automatic):
    """Halves its rate at every epoch's end, at which Lightning asks whether it has just restarted."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("flat", 1.0)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "flat"}}


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
        "z_alone": 1e9,  # these are tests of two bad steps running
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
        "schedulers": [
            {name: value for name, value in state.items() if not isinstance(value, str)}
            for state in checkpoint["lr_schedulers"]
        ],
        "generators": RNGState().state_dict(),
        "step": trainer.global_step,
        "epochs": trainer.fit_loop.epoch_progress.state_dict(),
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


@pytest.mark.parametrize(
    ("module_class", "workers"), [(Automatic, 0), (Automatic, 1), (Plateau, 0), (Manual, 0), (Logging, 0)]
)
def test_with_nothing_to_skip_an_undisturbed_run_comes_back_bit_for_bit(
    tmp_path: Path, module_class: type[Module], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across an epoch's end, with dropout, moments and a schedule."""
    undisturbed = train(tmp_path / "plain", module_class())
    callback = healer(skip_window=0)
    found = rolled_back(callback, monkeypatch)
    data = ResumableLoader(Points(), Shard(8 * EPOCH, 8), num_workers=workers)
    module = module_class(once(spiking(44, 45)))
    healed = train(tmp_path / "healed", module, RNGState(), callback, data=data)
    assert found == [(45, 30)]
    torch.testing.assert_close(everything(healed), everything(undisturbed), rtol=0, atol=0)
    assert module.seen[:46] == [(step, step) for step in range(46)]
    assert module.seen[46:] == [(step, step) for step in range(30, LAST_STEP)]


@MODULES
def test_a_healthy_run_is_the_same_bit_for_bit_with_and_without(
    tmp_path: Path, module_class: type[Module]
) -> None:
    modules = [module_class() for _ in range(2)]
    without = train(tmp_path / "without", modules[0])
    callback = healer()
    beside = train(tmp_path / "with", modules[1], callback)
    assert callback.rollbacks == 0
    torch.testing.assert_close(everything(beside), everything(without), rtol=0, atol=0)
    assert modules[1].seen == modules[0].seen
    names = sorted(path.name for path in (tmp_path / "with" / "checkpoints").iterdir())
    assert names == [f"rollback_{step:06d}.ckpt" for step in (30, 40, 50, 60, 70)]


def test_a_rollback_within_an_epoch_ends_it_as_the_undisturbed_run(tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "plain", Automatic(), steps=2 * EPOCH)
    callback = healer(skip_window=0)
    healed = train(tmp_path / "healed", Automatic(once(spiking(37, 38))), callback, steps=2 * EPOCH)
    assert callback.rollbacks == 1
    torch.testing.assert_close(everything(healed), everything(undisturbed), rtol=0, atol=0)


class Events(Callback):
    """What the loops do, by the step of the loggers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    def note(self, name: str, trainer: Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop
        self.seen.append((name, trainer.global_step, trainer.current_epoch, loop._batches_that_stepped))

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self.note("epoch starts", trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("epoch ends", trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("validated", trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("batch", trainer)


class Validated(Automatic):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[1]).square().mean())


@pytest.mark.parametrize(
    "schedule",
    [
        {"val_check_interval": 15, "check_val_every_n_epoch": None},
        {"val_check_interval": 10},
        {"val_check_interval": 5, "limit_train_batches": 15},
        {"check_val_every_n_epoch": 2},
    ],
    ids=str,
)
def test_loops_go_on_from_the_target_as_they_did_before(tmp_path: Path, schedule: dict[str, Any]) -> None:
    def run(name: str, fault: Fault, *callbacks: Callback) -> list[tuple[str, int, int, int]]:
        events, module = Events(), Validated(fault)
        trainer = Trainer(
            default_root_dir=tmp_path / name,
            callbacks=[*callbacks, events],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            max_steps=LAST_STEP,
            **schedule,
        )
        torch.manual_seed(1)
        trainer.fit(
            module, loader(), DataLoader(Points(), batch_size=None, sampler=[BatchIndex(0, range(8))])
        )
        return events.seen

    undisturbed = run("plain", spiking())
    healed = run("healed", once(spiking(44, 45)), healer(skip_window=0))
    spike = healed.index(next(event for event in healed if event[:2] == ("batch", 46)))
    # what belongs to step 46 comes before the rollback, what belongs to step 30 is done
    again = next(i for i in range(spike, len(healed)) if healed[i][:2] == ("batch", 31))
    first = next(i for i, event in enumerate(undisturbed) if event[:2] == ("batch", 31))
    while healed[again - 1] == undisturbed[first - 1] and healed[again - 1][1] == 30:
        again, first = again - 1, first - 1
    assert healed[again:] == undisturbed[first:]


def gradient_fault(number: int, value: float) -> Fault:
    """One entry of one gradient of this batch; the loss stays what it is."""

    def change(batch: int, loss: Tensor) -> Tensor:
        if batch != number:
            return loss
        changed = loss.clone()
        changed.register_hook(lambda gradient: gradient * value)
        return changed

    return change


@MODULES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_is_refused_and_undone_at_once(
    tmp_path: Path, module_class: type[Module], value: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = gradient_fault(34, value)
    if kind == "loss":
        fault = lambda number, loss: loss * value if number == 34 else loss  # noqa: E731
    callback, module = healer(), module_class(fault)
    found = rolled_back(callback, monkeypatch)

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            assert all(weight.isfinite().all() for weight in module.parameters())
            moments = [m for state in trainer.optimizers[0].state.values() for m in state.values()]
            assert all(moment.isfinite().all() for moment in moments)

    train(tmp_path, module, callback, Watch())
    assert found == [(35, 20)]
    assert [number for _, number in module.seen][:48] == [*range(35), *range(20, 32), 37]


def test_without_refusal_the_weights_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    monkeypatch.setattr(UpdateGuard, "refuse_if", lambda guard, refused: None)
    module, finite = Automatic(gradient_fault(34, torch.nan)), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            finite.append(bool(module.layer.weight.isfinite().all()))

    train(tmp_path, module, healer(), Watch())
    assert not all(finite)


def final_loss(module: Module) -> float:
    """On points without noise, of the weights alone."""
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((module.layer(x).squeeze(-1) - x @ torch.tensor([1.0, -2.0, 0.5])).square().mean())


@pytest.fixture(scope="module")
def undisturbed_loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    module = Automatic()
    train(tmp_path_factory.mktemp("undisturbed"), module)
    return final_loss(module)


@pytest.mark.parametrize(
    ("numbers", "expected", "skipped"),
    [
        # the checkpoint of step 30 has not proved to be healthy yet
        ((32, 33), [(33, 20)], (30, 36)),
        # on the very step of a checkpoint, 40: the second bad step, and the first
        ((38, 39), [(39, 30)], (36, 42)),
        ((39, 40), [(40, 30)], (37, 43)),
        # one bad step, the checkpoint of step 40, then two more: 40 never proved to be healthy
        ((37, 42, 43), [(43, 30)], (40, 46)),
        # two faults with the checkpoint of step 40 between them
        ((37, 38, 42, 43), [(38, 30), (37, 30)], (35, 46)),
        # a burst, half of which is left behind the first window
        ((44, 45, 46, 47, 48, 49, 50), [(45, 30), (43, 30)], (42, 52)),
    ],
    ids=str,
)
def test_where_spikes_are_taken_back_to_and_what_is_skipped(
    tmp_path: Path,
    numbers: tuple[int, ...],
    expected: list[tuple[int, int]],
    skipped: tuple[int, int],
    undisturbed_loss: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bad batches return whenever their numbers come."""
    callback, data = healer(), loader()
    found = rolled_back(callback, monkeypatch)
    module = Automatic(spiking(*numbers))
    train(tmp_path, module, callback, data=data)
    assert found == expected
    assert data.skipped == [range(*skipped)]
    last_try = [number for _, number in module.seen[-(LAST_STEP - expected[-1][1]) :]]
    stream = [number for number in range(LAST_STEP * 2) if number not in range(*skipped)]
    assert last_try == stream[expected[-1][1] : LAST_STEP]
    assert final_loss(module) < 1.1 * undisturbed_loss


def test_a_fault_before_the_first_checkpoint_goes_back_to_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(tmp_path / "plain", Automatic())
    callback = healer(skip_window=0)
    found = rolled_back(callback, monkeypatch)
    nan_once = once(lambda number, loss: loss * torch.nan if number == 7 else loss)
    healed = train(tmp_path / "healed", Automatic(nan_once), callback)
    assert found == [(8, 0)]
    torch.testing.assert_close(everything(healed), everything(undisturbed), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fault", "target"),
    [(lambda number, loss: loss * torch.nan if number == 7 else loss, 0), (spiking(44, 45), 30)],
    ids=["beginning", "checkpoint"],
)
def test_a_healed_run_is_one_that_never_met_the_skipped_batches(
    tmp_path: Path, fault: Fault, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what a fault leaves behind is other data and nothing else."""
    data, callback = loader(), healer()
    found = rolled_back(callback, monkeypatch)
    healed = train(tmp_path / "healed", Automatic(fault), callback, data=data)
    assert [to for _, to in found] == [target]
    never = loader()
    for batches in data.skipped:
        never.skip(batches)
    untouched = train(tmp_path / "never", Automatic(), data=never)
    torch.testing.assert_close(everything(healed), everything(untouched), rtol=0, atol=0)


class BreakWeights(Callback):
    """Spoils the weights in the step that ends with a checkpoint, once: the loss shows it one step later."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        if len(self.module.seen) == 40:
            self.module.layer.weight.data.mul_(-30)


def test_a_poisoned_checkpoint_is_never_restored(
    tmp_path: Path, undisturbed_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, module = healer(), Automatic()
    found = rolled_back(callback, monkeypatch)
    train(tmp_path, module, callback, BreakWeights(module))
    assert found == [(41, 30)]
    assert final_loss(module) < 1.1 * undisturbed_loss


def test_a_ring_that_takes_its_newest_checkpoint_would_restore_the_poisoned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    monkeypatch.setattr(RollbackRing, "target", property(lambda ring: ring.steps[-1]))
    callback, module = healer(), Automatic()
    found = rolled_back(callback, monkeypatch)
    with pytest.raises(UnhealthyTrainingError):
        train(tmp_path, module, callback, BreakWeights(module))
    assert found == [(41, 40)] * 3


def for_ever(number: int, loss: Tensor) -> Tensor:
    return loss * 50 + 3 if number >= 32 else loss


def test_at_the_cap_it_stops_and_names_the_last_healthy_checkpoint(tmp_path: Path) -> None:
    callback = healer()
    with pytest.raises(UnhealthyTrainingError, match=r"perplexity of step \d+, .* 3 of at most 3") as stopped:
        train(tmp_path, Automatic(for_ever), callback)
    assert stopped.value.checkpoint == tmp_path / "checkpoints" / "rollback_000020.ckpt"
    assert str(stopped.value.checkpoint) in str(stopped.value)
    assert callback.rollbacks == 3
    module = Automatic()
    trainer = train(tmp_path / "on", module, healer(), steps=30, ckpt_path=stopped.value.checkpoint)
    assert trainer.global_step == 30
    assert [step for step, _ in module.seen] == list(range(20, 30))


def test_at_the_cap_it_may_also_go_on_with_a_warning(tmp_path: Path) -> None:
    callback = healer(at_cap="warn", max_rollbacks=1)
    with pytest.warns(UserWarning, match="1 of at most 1 rollbacks are used up") as warned:
        trainer = train(tmp_path, Automatic(for_ever), callback)
    assert (trainer.global_step, callback.rollbacks) == (LAST_STEP, 1)
    assert len(warned) < LAST_STEP


def test_without_a_healthy_checkpoint_it_stops(tmp_path: Path) -> None:
    """A checkpoint of a run without the callback has no ring."""
    train(tmp_path / "before", Automatic(), ResumableCheckpoint(every_n_steps=10), steps=10)
    start = tmp_path / "before" / "checkpoints" / "step_000010.ckpt"
    nan = lambda number, loss: loss * torch.nan if number == 12 else loss  # noqa: E731
    saver = ResumableCheckpoint(every_n_steps=10)
    with pytest.raises(UnhealthyTrainingError, match="there is no healthy checkpoint") as stopped:
        train(tmp_path / "after", Automatic(nan), healer(), saver, ckpt_path=start)
    assert stopped.value.checkpoint is None


class Rates(Callback):
    """The learning rate that each step is really taken with."""

    def __init__(self) -> None:
        self.used: list[tuple[int, float]] = []

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        update = trainer.optimizers[0]._cuda_graph_capture_health_check  # called inside AdamW's step

        def note() -> None:
            self.used.append((trainer.global_step, float(trainer.optimizers[0].param_groups[0]["lr"])))
            update()

        trainer.optimizers[0]._cuda_graph_capture_health_check = note


@pytest.mark.parametrize("module_class", [Automatic, Manual])
def test_learning_rates_are_lower_while_it_cools_down_and_the_schedule_stays(
    tmp_path: Path, module_class: type[Module]
) -> None:
    rates, callback = Rates(), healer(lr_factor=0.25, cool_down=12)
    trainer = train(tmp_path, module_class(spiking(44, 45)), callback, rates)
    assert callback.rollbacks == 1
    for index, (step, rate) in enumerate(rates.used):
        cooling = index >= 46 and step < 30 + 12
        assert rate == pytest.approx(0.05 * 0.99**step * (0.25 if cooling else 1.0)), step
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.99**LAST_STEP)


def test_while_it_cools_down_only_what_is_not_finite_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(number: int, loss: Tensor) -> Tensor:
        # after the rollback to step 30 batches 42 to 47 are skipped
        loss = spiking(44, 45, 39, 40)(number, loss) if calls.append(number) or 44 in calls else loss
        return loss * torch.nan if number == 55 else loss

    calls: list[int] = []
    callback = healer(cool_down=20)
    found = rolled_back(callback, monkeypatch)
    train(tmp_path, Automatic(fault), callback)
    assert found[0] == (45, 30)
    # the spikes of steps 40 and 41 were passed, and five good steps followed; batch 55 comes six steps early
    assert found[1:] == [(50, 40)]


def test_reading_one_step_later_comes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: refused on the device, acted upon after one more step."""

    def fault(number: int, loss: Tensor) -> Tensor:
        return gradient_fault(8, torch.inf)(number, spiking(44, 45)(number, loss))

    before = Automatic(fault)
    at_once = train(tmp_path / "once", before, healer())
    monkeypatch.setattr(ppl_delta_rollback, "_lag_on", lambda device: 1)
    monkeypatch.setattr(UpdateGuard, "refuse_if", UpdateGuard.refuse_on_device_if)
    callback, module = healer(), Automatic(fault)
    found = rolled_back(callback, monkeypatch)
    later = train(tmp_path / "later", module, callback)
    assert found == [(9, 0), (40, 30)]
    # one more step was taken before each was acted upon
    assert {seen for _, seen in module.seen} - {seen for _, seen in before.seen} == {9, 46}
    torch.testing.assert_close(everything(later), everything(at_once), rtol=0, atol=0)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_fault_of_the_last_step_is_seen(tmp_path: Path, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppl_delta_rollback, "_lag_on", lambda device: lag)
    nan = lambda number, loss: loss * torch.nan if number == LAST_STEP - 1 else loss  # noqa: E731
    callback, module = healer(), Automatic(nan)
    trainer = train(tmp_path, module, callback)
    assert (callback.rollbacks, trainer.global_step) == (1, LAST_STEP)
    assert all(weight.isfinite().all() for weight in module.parameters())


@MODULES
def test_the_records_have_every_step_once_with_what_it_was_judged(
    tmp_path: Path, module_class: type[Module]
) -> None:
    train(tmp_path, module_class(spiking(44, 45)), healer(threshold=0.05), MetricsJSONL())
    table = read_metrics(tmp_path / "metrics.jsonl")
    assert table["step"].tolist() == list(range(1, LAST_STEP + 1))
    assert table["attempt"].tolist() == [1] * 30 + [2] * 40
    assert table["rollback_count"].tolist() == [0.0] * 30 + [1.0] * 40
    assert table["is_spike"].tolist() == (table["ppl_delta"] > 0.05).astype(float).tolist()
    if module_class is not Automatic:  # which records nothing itself
        assert table["perplexity"].tolist() == pytest.approx(np.exp(np.minimum(table["loss"], 20)), rel=1e-6)
    first = read_first_attempt(tmp_path / "metrics.jsonl")
    assert [first[step]["is_spike"] for step in (45, 46)] == [1.0, 1.0]
    assert first[45]["perplexity"] > 10 * first[44]["perplexity"]


def read_first_attempt(path: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["step"]: row for row in rows if row["kind"] == "train" and row["attempt"] == 1}


def test_loggers_see_spikes_and_rollbacks(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path))
    train(tmp_path, Automatic(spiking(22, 44, 45)), healer(), logger=logger, log_every_n_steps=5)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rollback/spike"]]
    told = [(int(row["step"]), float(row["rollback/spike"]), float(row["rollback/count"])) for row in rows]
    went_back = next(number for number, row in enumerate(rows) if row["rollback/to_step"])
    assert rows[went_back]["rollback/to_step"] == "30"
    # rows stand at their last step; behind the rollback they go on from its target
    assert [step for step, _, _ in told[: went_back + 2]] == [*range(4, 45, 5), 45, 34]
    assert [count for _, _, count in told[: went_back + 2]] == [0.0] * 9 + [1.0] * 2
    by_step = {step: spike for step, spike, _ in told[: went_back + 1]}
    assert by_step[24] > 10 * max(by_step[19], by_step[29])  # of step 23, between two rows
    assert by_step[45] > 10
    assert told[went_back + 1][1] < 10


def test_a_spike_that_was_told_at_a_rollback_is_not_told_again(tmp_path: Path) -> None:
    """Also where training goes back to a place between two rows."""
    logger = RunCSVLogger(str(tmp_path))
    train(tmp_path, Automatic(spiking(44, 45)), healer(), logger=logger, log_every_n_steps=4)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rollback/spike"]]
    went_back = next(number for number, row in enumerate(rows) if row["rollback/to_step"])
    assert float(rows[went_back]["rollback/spike"]) > 10
    assert rows[went_back + 1]["step"] == "31"
    assert float(rows[went_back + 1]["rollback/spike"]) < 1


def test_later_checkpoints_are_dropped_and_the_target_is_saved_as_it_is_now(tmp_path: Path) -> None:
    callback, saver = healer(), ResumableCheckpoint(every_n_steps=4, keep_last=9)
    seen: list[set[str]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            seen.append({path.name for path in (tmp_path / "checkpoints").iterdir()})

    train(tmp_path, Automatic(spiking(44, 45)), callback, saver, Watch(), steps=46)
    before, after = seen[45], seen[46]
    assert {"step_000040.ckpt", "step_000044.ckpt", "rollback_000040.ckpt"} <= before
    assert after == {name for name in before if int(name[-11:-5]) <= 30} | {"step_000030.ckpt"}
    saved = read_checkpoint(tmp_path / "checkpoints" / "step_000030.ckpt")
    assert saved["callbacks"][callback.state_key]["rollbacks"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"trigger": "loose"},
        {"at_cap": "crash"},
        {"patience": 0},
        {"healthy_after": 0},
        {"ring_size": 0},
        {"warm_up": 0},
        {"baseline_steps": 1},
        {"skip_window": -1},
        {"cool_down": -1},
        {"max_rollbacks": -1},
        {"threshold": 0.0},
        {"z_limit": -1.0},
        {"lr_factor": 0.0},
        {"every_n_steps": 0},
    ],
    ids=str,
)
def test_impossible_values_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PPLDeltaRollback(**options)


def test_what_cannot_be_set_back_is_refused_before_training(tmp_path: Path) -> None:
    plain = DataLoader(TensorDataset(torch.randn(40, 3), torch.randn(40)), batch_size=8)
    with pytest.raises(MisconfigurationException, match="can be set back and skip batches"):
        train(tmp_path, Automatic(), healer(), data=plain)
    with pytest.raises(MisconfigurationException, match="has to stand before MetricsJSONL"):
        train(tmp_path, Automatic(), MetricsJSONL(), healer())


def test_a_module_that_shows_no_loss_is_told_so(tmp_path: Path) -> None:
    class Silent(Manual):
        def record(self, loss: Tensor) -> None:
            if self.trainer.global_step == 1:
                self.step_metrics.append(1, {"loss": loss.detach()})

    with pytest.raises(MisconfigurationException, match="Silent shows no 'loss' at step 2"):
        train(tmp_path, Silent(), healer())

    class Stale(Logging):
        def record(self, loss: Tensor) -> None:
            if self.trainer.global_step == 1:
                self.log("loss", loss)

    with pytest.raises(MisconfigurationException, match="Stale shows no 'loss' at step 2"):
        train(tmp_path, Stale(), healer())
    with pytest.raises(MisconfigurationException, match="shows no 'lm_loss' at step 1"):
        train(tmp_path, Automatic(), healer(monitor="lm_loss"))


def test_a_part_of_the_loss_can_be_monitored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parts(Automatic):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            part = 100 * loss.detach() if int(batch[0]) in (44, 45) else loss.detach()
            return {"loss": loss, "lm_loss": part + 1}

    for monitor, expected in (("lm_loss", [(45, 30)]), ("loss", [])):
        callback = healer(monitor=monitor)
        found = rolled_back(callback, monkeypatch)
        train(tmp_path / monitor, Parts(), callback)
        assert found == expected


def test_the_batches_of_an_accumulated_step_are_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(tmp_path / "plain", Automatic(), steps=60, accumulate_grad_batches=3)
    callback, rows = healer(skip_window=0), {}
    found = rolled_back(callback, monkeypatch)
    judge = callback._health.observe

    def observe(step: int, batch: int, loss: float, gradient: float) -> Any:
        rows[step] = (batch, loss)
        return judge(step, batch, loss, gradient)

    monkeypatch.setattr(callback._health, "observe", observe)
    # an epoch of 20 batches has 7 steps, the last of two batches
    module = Automatic(once(spiking(113, 114, 115)))
    healed = train(tmp_path / "healed", module, callback, steps=60, accumulate_grad_batches=3)
    assert found == [(40, 30)]
    assert [rows[step][0] for step in (1, 2, 7, 8, 9)] == [0, 3, 18, 20, 23]
    for step, batches in ((1, slice(0, 3)), (2, slice(3, 6)), (8, slice(20, 23))):
        assert rows[step][1] == pytest.approx(np.mean(module.losses[batches]))
    torch.testing.assert_close(everything(healed), everything(undisturbed), rtol=0, atol=0)


class Counting(Callback):
    """Has a state, and wants to stop in a step that is undone."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.batches += 1
        trainer.should_stop = len(pl_module.seen) == 46

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


def test_other_callbacks_go_back_too_and_a_stop_that_was_asked_for_is_forgotten(tmp_path: Path) -> None:
    counting = Counting()
    trainer = train(tmp_path, Automatic(spiking(44, 45)), healer(), counting)
    assert trainer.global_step == LAST_STEP
    assert counting.batches == LAST_STEP


def test_the_baseline_goes_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = healer(skip_window=0)
    judged: dict[int, list[float]] = {}
    observe = callback._health.observe

    def watch(step: int, *values: Any) -> Any:
        result = observe(step, *values)
        judged.setdefault(step, []).append(result[0].ppl_delta)
        return result

    monkeypatch.setattr(callback._health, "observe", watch)
    train(tmp_path, Automatic(once(spiking(44, 45))), RNGState(), callback)
    for step in range(31, 45):
        first, again = judged[step]
        assert first == again


def test_a_rate_configured_anew_at_a_resume_outlives_a_rollback_to_before_it(tmp_path: Path) -> None:
    class Slower(Automatic):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def callbacks() -> list[Callback]:
        return [ConfiguredOptimizerValues(), healer(), ResumableCheckpoint(every_n_steps=18)]

    train(tmp_path, Automatic(), *callbacks(), steps=36)
    start, used = tmp_path / "checkpoints" / "step_000036.ckpt", callbacks()
    trainer = train(tmp_path, Slower(spiking(37, 38)), *used, steps=45, ckpt_path=start)
    assert used[1].rollbacks == 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.99**45)


def test_one_step_far_off_is_taken_back_by_itself(tmp_path: Path) -> None:
    patient, prompt = healer(), healer(z_alone=12.0)
    train(tmp_path / "patient", Automatic(spiking(25)), patient, steps=40)
    train(tmp_path / "prompt", Automatic(spiking(25)), prompt, steps=40)
    assert patient.rollbacks == 0
    assert prompt.rollbacks == 1
    assert prompt.history[0].fault.last_step == prompt.history[0].fault.first_step


@pytest.mark.filterwarnings("ignore:The grad scaler")
def test_the_gradient_scaler_goes_back_and_its_refusals_are_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[tuple[int, float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            scales.append((trainer.global_step, float(trainer.precision_plugin.state_dict()["scale"])))

    def fault(number: int, loss: Tensor) -> Tensor:
        return gradient_fault(25, torch.inf)(number, spiking(44, 45)(number, loss))

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=16)
    callback = healer()
    found = rolled_back(callback, monkeypatch)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    monkeypatch.setattr(precision, "forward_context", torch.enable_grad)  # the scaler alone is meant here
    train(tmp_path, Automatic(fault), callback, Watch(), plugins=[AtomicCheckpointIO(), precision])
    assert found == [(45, 30)]
    # it halves at step 26, and doubles after 16 good ones: at step 42, and after the rollback at 42 again
    assert dict(scales[:46])[30] == 4.0
    assert dict(scales[:46])[45] == 8.0
    assert scales[46] == (31, 4.0)


def at_call(owner: Any, name: str, number: int, *, after: bool = False) -> Callable[[], None]:
    """Kill when this function of an object or class is called for the n-th time, before it acts or after."""

    def install() -> None:
        original, calls = getattr(owner, name), [0]

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)

    return install


def replacing(name: str, number: int, *, after: bool) -> Callable[[], None]:
    """Kill just before or after a file gets its name for the n-th time."""

    def install() -> None:
        original, calls = os.replace, [0]

        def replace(source: Any, target: Any) -> None:
            calls[0] += Path(target).name == name
            hit = calls[0] == number and Path(target).name == name
            if hit and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            original(source, target)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace

    return install


def run_to_be_killed(
    directory: Path, install: Callable[[], None] = lambda: None, fault: Fault | None = None
) -> int:
    """A run of 50 steps, forked, from its newest checkpoint if it has one; how it ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        install()
        checkpoints = sorted((directory / "checkpoints").glob("step_*.ckpt"))
        callback = healer(cool_down=15, lr_factor=0.5)
        saver = ResumableCheckpoint(every_n_steps=4, keep_last=2)
        trainer = train(
            directory,
            Manual(fault or spiking(36, 37)),
            RNGState(),
            callback,
            MetricsJSONL(),
            saver,
            steps=50,
            ckpt_path=checkpoints[-1] if checkpoints else None,
        )
        torch.save({"end": everything(trainer), "rollbacks": callback.rollbacks}, directory / "end.pt")
        status = 0
    finally:
        os._exit(status)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert run_to_be_killed(directory) == 0
    return directory


KILLS = {
    "before the fault": at_call(Module, "loss", 33),
    "before the second bad step": at_call(Module, "loss", 38),
    "as it begins": at_call(PPLDeltaRollback, "_roll_back", 1),
    "with training set back": at_call(PPLDeltaRollback, "_roll_back", 1, after=True),
    "with a new attempt begun": at_call(MetricsJSONL, "start_attempt", 1, after=True),
    "with half of the target written": replacing("step_000030.ckpt", 1, after=False),
    "with the target written": replacing("step_000030.ckpt", 1, after=True),
    "with later checkpoints gone": at_call(ResumableCheckpoint, "set_back", 1, after=True),
    "as it ends": at_call(PPLDeltaRollback, "_finish_rollback", 1, after=True),
    "while it cools down": at_call(Module, "loss", 47),
    "with half of the ring's checkpoint written": replacing("rollback_000030.ckpt", 1, after=False),
    "with the ring's checkpoint written": replacing("rollback_000030.ckpt", 1, after=True),
}


def assert_same_ends(killed: Path, uninterrupted: Path) -> None:
    """Weights and all else bit for bit, every step recorded once, and the same files left."""
    ends = [torch.load(path / "end.pt") for path in (killed, uninterrupted)]
    assert ends[1]["rollbacks"] == 1
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    tables = [read_metrics(path / "metrics.jsonl") for path in (killed, uninterrupted)]
    for table in tables:
        assert table["step"].tolist() == list(range(1, 51))
    for column in ("loss", "perplexity", "ppl_delta", "rollback_count"):
        assert tables[0][column].tolist() == tables[1][column].tolist(), column
    names = [{file.name for file in (run / "checkpoints").glob("*.ckpt")} for run in (killed, uninterrupted)]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_run_killed_around_a_rollback_ends_as_the_uninterrupted_one(
    tmp_path: Path, kill: str, uninterrupted: Path
) -> None:
    assert run_to_be_killed(tmp_path, KILLS[kill]) == -signal.SIGKILL
    assert run_to_be_killed(tmp_path) == 0
    assert_same_ends(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_run_killed_after_going_back_to_the_beginning_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    def fault(number: int, loss: Tensor) -> Tensor:
        return loss * torch.nan if number == 7 else loss

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    assert run_to_be_killed(whole, fault=fault) == 0
    assert run_to_be_killed(killed, at_call(Module, "loss", 11), fault) == -signal.SIGKILL
    assert [path.name for path in sorted((killed / "checkpoints").iterdir())] == [
        "rollback_000000.ckpt",
        "step_000000.ckpt",
    ]
    assert run_to_be_killed(killed, fault=fault) == 0
    torch.testing.assert_close(torch.load(killed / "end.pt"), torch.load(whole / "end.pt"), rtol=0, atol=0)
    assert read_metrics(killed / "metrics.jsonl")["step"].tolist() == list(range(1, 51))


class Calls:
    """Counts the calls of Python and C functions from now on, and may kill at one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.count = 0
        self.last = last
        sys.setprofile(self.see)

    def see(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


PARTS: dict[str, tuple[Any, str]] = {
    "all of it": (Trainer, "fit"),
    "a checkpoint's writing": (AtomicCheckpointIO, "save_checkpoint"),
    "a rollback": (PPLDeltaRollback, "_act_on"),
}


def calls_counted(part: str, result: Path) -> Callable[[], None]:
    """Write down how many calls there are inside each occurrence of a part."""

    def install() -> None:
        owner, name = PARTS[part]
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls = Calls()
            try:
                return original(*args, **kwargs)
            finally:
                sys.setprofile(None)
                with result.open("a") as file:
                    file.write(f"{calls.count}\n")

        setattr(owner, name, counted)

    return install


def at_moment(part: str, occurrence: int, last: int) -> Callable[[], None]:
    """Kill at a call inside the n-th occurrence of a part."""

    def install() -> None:
        owner, name = PARTS[part]
        original, seen = getattr(owner, name), [0]

        def killed(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == occurrence:
                Calls(last)
            try:
                return original(*args, **kwargs)
            finally:
                sys.setprofile(None)

        setattr(owner, name, killed)

    return install


# as many moments as one wants: THERIA_RANDOM_KILLS=60 pytest -k random_moment
RANDOM_KILLS = int(os.environ.get("THERIA_RANDOM_KILLS", "8"))


@pytest.fixture(scope="module")
def calls_of_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    found = {}
    for part in PARTS:
        directory = tmp_path_factory.mktemp("counted")
        assert run_to_be_killed(directory, calls_counted(part, directory / "calls.txt")) == 0
        found[part] = [int(line) for line in (directory / "calls.txt").read_text().split()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RANDOM_KILLS))
def test_a_run_killed_at_a_random_moment_ends_as_the_uninterrupted_one(
    tmp_path: Path, number: int, uninterrupted: Path, calls_of_parts: dict[str, list[int]]
) -> None:
    """Of every four moments two are anywhere, one inside a checkpoint's writing and one inside a rollback."""
    generator = random.Random(number)
    part = ("all of it", "a rollback", "a checkpoint's writing", "all of it")[number % 4]
    occurrence = generator.randint(1, len(calls_of_parts[part]))
    last = generator.randint(1, calls_of_parts[part][occurrence - 1] * 9 // 10)
    assert run_to_be_killed(tmp_path, at_moment(part, occurrence, last)) == -signal.SIGKILL
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        read_checkpoint(path)
    assert run_to_be_killed(tmp_path) == 0
    assert_same_ends(tmp_path, uninterrupted)
