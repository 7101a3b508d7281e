"""Gates that fail in scripted ways in short trainings: what is said, when, and what survives a restore."""

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed
from torch.utils.data import Dataset

from callbacks import GateMonitor, PPLDeltaRollback, ResumableCheckpoint, UnhealthyGatesError
from datamodules.loader import BatchIndex, ResumableLoader, Shard
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.step_metrics import StepMetrics
from theria.memory import TokenGate, gate_statistics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),  # made on the spot
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]

LAST_STEP = 40
SETTINGS: dict[str, Any] = {"baseline_step": 10, "check_from": 20, "every_n_steps": 5}
CHECKED = [20, 25, 30, 35, 40]
Script = Callable[[int], Tensor]


def gates(low: float = 0.05, middle: float = 0.5, high: float = 0.95) -> Tensor:
    """Healthy gates (batch, length, heads): a third each is low, in the middle and high."""
    return torch.tensor([low, middle, high]).repeat(4)[None, :, None].expand(2, 12, 2).clone()


def healthy(step: int) -> Tensor:
    return gates(middle=0.5 + 0.001 * step)


def closed(step: int) -> Tensor:
    return gates(0.0, 0.001, 0.02) if step > 22 else healthy(step)


def opened(step: int) -> Tensor:
    return gates(0.991, 0.999, 0.9999) if step > 22 else healthy(step)


def constant(step: int) -> Tensor:
    # heads differ, tokens do not
    return torch.tensor([0.05, 0.95]).expand(2, 12, 2) if step > 22 else healthy(step)


def undecided(step: int) -> Tensor:
    return gates(0.4, 0.5, 0.6) if step > 22 else healthy(step)


def not_finite(step: int) -> Tensor:
    return gates(middle=torch.nan) if step > 22 else healthy(step)


class Numbers(Dataset[Tensor]):
    def __getitem__(self, index: BatchIndex) -> Tensor:
        return torch.tensor([float(index.epoch * 20 + index.ids.start)])


class Module(LightningModule):
    """A weight to train, a gate to be found, and rows of the scripted gates. `loss_of` may spoil a batch."""

    def __init__(self, script: Script, capacity: int = 7, loss_of: Script | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.gate = TokenGate(2, 1).requires_grad_(False)
        self.script, self.loss_of = script, loss_of
        self.step_metrics = StepMetrics(capacity)
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.weight - 1).square() + 1
        return loss if self.loss_of is None else loss * self.loss_of(int(batch))

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        step = self.trainer.global_step
        self.seen.append(step)
        found = gate_statistics(self.script(step))
        self.step_metrics.append(
            step,
            {f"gate_{name}": value.to(self.device) for name, value in zip(found._fields, found, strict=True)},
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(Numbers(), Shard(20, 1))


class Recorder:
    """A logger of the gate tags, by the step they were logged at."""

    save_dir = name = version = root_dir = log_dir = None

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "gate/faults" in metrics:
            self.logged[step] = metrics

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def fit(
    module: Module, *callbacks: Callback, resume: Path | None = None, **changes: Any
) -> dict[int, dict[str, float]]:
    """What was logged."""
    recorder = Recorder()
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": LAST_STEP,
        "max_epochs": -1,
        "enable_checkpointing": any(isinstance(callback, ResumableCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(
        **options | changes, logger=False, callbacks=list(callbacks), plugins=[AtomicCheckpointIO()]
    )
    trainer.loggers = [recorder]  # type: ignore[list-item]
    trainer.fit(module, ckpt_path=resume)
    return recorder.logged


def monitor(**changes: Any) -> GateMonitor:
    return GateMonitor(**SETTINGS | changes)


def said(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "gates have failed" in str(warning.message)]


@pytest.mark.parametrize("capacity", [1, 5, 7, 100])
def test_healthy_gates_are_checked_and_nothing_is_said(capacity):
    found: list[dict[int, dict[str, float]]] = []
    assert not said(lambda: found.append(fit(Module(healthy, capacity), monitor())))
    (logged,) = found
    # a step is judged once the next one is queued, and the last where training ends
    assert list(logged) == [21, 26, 31, 36, 40]
    assert all(values == {"gate/faults": 0, "gate/polarized_gain": 0.0} for values in logged.values())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (closed, "the gates are closed: mean 0.0070"),
        (opened, "the gates are open: mean 0.9966"),
        (constant, "do not depend on their tokens: spread over tokens 0"),
        (undecided, r"do not polarise: the share below 0.1 or above 0.9 changed by -0.667"),
        (not_finite, "the gates are not finite"),
    ],
)
def test_every_fault_is_warned_of_once_and_stops_by_name(script, reason):
    (message,) = said(lambda: fit(Module(script), monitor()))
    assert re.match(f"the gates have failed at step 25: .*{reason}", message)
    module = Module(script)
    with pytest.raises(UnhealthyGatesError, match=reason) as stopped:
        fit(module, monitor(action="stop"))
    assert stopped.value.step == 25
    assert len(stopped.value.faults) == (2 if script is constant_and_undecided else 1)
    assert module.seen[-1] == 26


def constant_and_undecided(step: int) -> Tensor:
    """Faulty at 25, more so at 30, healthy at 35, faulty again at 40."""
    if 22 < step < 28 or step > 37:
        return undecided(step)
    return torch.full((2, 12, 2), 0.5) if 28 < step < 32 else healthy(step)


def test_a_warning_comes_where_there_are_more_faults_than_before():
    found: list[dict[int, dict[str, float]]] = []
    messages = said(lambda: found.append(fit(Module(constant_and_undecided), monitor())))
    assert [int(re.findall(r"step (\d+)", message)[0]) for message in messages] == [25, 30, 40]
    assert [values["gate/faults"] for values in found[0].values()] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("settings", "script"),
    [
        ({"closed_below": 0.6}, healthy),
        ({"open_above": 0.4}, healthy),
        ({"least_token_std": 0.9}, healthy),
        ({"least_gain": 0.1}, healthy),
    ],
)
def test_thresholds_are_those_given(settings, script):
    assert said(lambda: fit(Module(script), monitor(**settings)))
    relaxed = {"closed_below": 0.0, "open_above": 1.0, "least_token_std": 0.0, "least_gain": -1.0}
    for failing in (closed, opened, constant, undecided):
        assert not said(lambda failing=failing: fit(Module(failing), monitor(**relaxed)))


def test_the_baseline_is_of_its_step_alone():
    def early(step: int) -> Tensor:
        return gates() if step == 10 else gates(0.4, 0.5, 0.6)

    logged = fit(Module(early), monitor(least_gain=-1.0))
    for values in logged.values():
        assert values["gate/polarized_gain"] == pytest.approx(-2 / 3, abs=1e-6)
    assert fit(Module(early), monitor(baseline_step=11))[21]["gate/polarized_gain"] == 0


@pytest.mark.parametrize("stop_at", [9, 10, 11, 19, 20, 21, 25])
def test_a_resumed_run_says_what_the_whole_one_says(tmp_path, stop_at):
    def drifting(step: int) -> Tensor:
        return gates(low=0.05 if step < 10 or step % 3 else 0.3, middle=0.5 if step < 24 else 0.02)

    whole = fit(Module(drifting), monitor())
    saved = ResumableCheckpoint(every_n_steps=stop_at, dirpath=str(tmp_path))
    # a run of all steps, stopped by hand: the end of a run would have judged everything
    with pytest.raises(RuntimeError, match="killed"):
        fit(Module(drifting), monitor(), saved, Kill(stop_at + 1))
    path = tmp_path / f"step_{stop_at:06d}.ckpt"
    later = fit(Module(drifting), monitor(), ResumableCheckpoint(100, dirpath=str(tmp_path)), resume=path)
    assert later == {step: values for step, values in whole.items() if step >= stop_at}
    assert later


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("first", [0, 1])
def test_a_rollback_restores_what_the_monitor_knew(tmp_path, first):
    """Batch 11 breaks the loss, and the gates of steps 10 to 12; step 5's checkpoint is gone back to."""
    broken = {"now": True}

    def script(step: int) -> Tensor:
        return gates(0.4, 0.5, 0.6) if broken["now"] and step >= 10 else healthy(step)

    def loss_of(number: int) -> Tensor:
        if number == 11 and broken["now"]:
            return torch.tensor(torch.nan)
        return torch.ones(())

    class Mend(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if broken["now"] and 12 in module.seen and trainer.global_step < 12:
                broken["now"] = False

    module = Module(script, loss_of=loss_of)
    rollback = PPLDeltaRollback(every_n_steps=5, healthy_after=3, skip_window=0, dirpath=str(tmp_path))
    pair = [monitor(), rollback]
    with pytest.warns(UserWarning, match="goes back from step 12 to step 5"):
        logged = fit(module, *(pair if first == 0 else pair[::-1]), Mend())
    # the baseline is of the second step 10, whose gates are healthy
    assert all(values["gate/polarized_gain"] == 0 for values in logged.values())
    assert len(logged) == len(CHECKED)


def spoiled_at(step: int) -> Script:
    """The loss of a step of the first attempt is not a number."""
    left = [step - 1]

    def loss_of(number: int) -> Tensor:
        spoil = left == [number]
        left[:] = [] if spoil else left
        return torch.tensor(torch.nan) if spoil else torch.ones(())

    return loss_of


def roll_back(module: Module, watching: GateMonitor, directory: Path) -> dict[int, dict[str, float]]:
    rollback = PPLDeltaRollback(every_n_steps=5, healthy_after=3, skip_window=0, dirpath=str(directory))
    with pytest.warns(UserWarning, match="goes back"):
        return fit(module, watching, rollback)


def test_a_check_of_training_that_is_undone_does_not_count(tmp_path):
    """Step 11 is queued when step 12 breaks: its gates are closed, and healthy once it is trained again."""
    times: list[int] = []

    def script(step: int) -> Tensor:
        times.append(step)
        return gates(0.0, 0.001, 0.02) if step == 11 and times.count(11) == 1 else healthy(step)

    watching = monitor(baseline_step=4, check_from=11, every_n_steps=11, action="stop")
    logged = roll_back(Module(script, loss_of=spoiled_at(12)), watching, tmp_path)
    assert times.count(11) == 2
    assert list(logged) == [12, 23, 34]


def test_a_rollback_to_a_checked_step_does_not_look_for_its_row(tmp_path):
    """Step 10 is judged in the first attempt, and its row is gone in the second."""
    watching = monitor(baseline_step=4, check_from=10)
    module = Module(healthy, loss_of=spoiled_at(18))
    logged = roll_back(module, watching, tmp_path)
    assert module.seen[18] == 11
    assert list(logged) == [11, 16, 21, 26, 31, 36, 40]


def test_a_resumed_run_does_not_repeat_a_warning(tmp_path):
    saving = ResumableCheckpoint(every_n_steps=27, dirpath=str(tmp_path))
    with pytest.raises(RuntimeError, match="killed"), pytest.warns(UserWarning, match="at step 25"):
        fit(Module(closed), monitor(), saving, Kill(28))
    again = ResumableCheckpoint(every_n_steps=100, dirpath=str(tmp_path))
    assert not said(lambda: fit(Module(closed), monitor(), again, resume=tmp_path / "step_000027.ckpt"))


def test_a_monitor_may_join_a_run_that_resumes(tmp_path):
    saving = ResumableCheckpoint(every_n_steps=20, dirpath=str(tmp_path))
    fit(Module(healthy), saving, max_steps=20)
    again = ResumableCheckpoint(every_n_steps=100, dirpath=str(tmp_path))
    logged = fit(Module(healthy), monitor(), again, resume=tmp_path / "step_000020.ckpt")
    assert list(logged) == [26, 31, 36, 40]  # the baseline is of step 21


def test_a_checkpoint_within_a_step_is_no_fault(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=5, save_top_k=-1)
    logged = fit(Module(healthy), monitor(), saving, enable_checkpointing=True)
    assert list(logged) == [21, 26, 31, 36, 40]


def test_a_checkpoint_of_the_baselines_step_holds_it(tmp_path):
    """As a rollback to that very step needs it: its row is not seen again."""
    watching = monitor()
    fit(Module(healthy), watching, ResumableCheckpoint(10, dirpath=str(tmp_path), keep_last=9))
    saved = torch.load(tmp_path / "step_000010.ckpt", weights_only=True)["callbacks"]["GateMonitor"]
    assert saved["pending"][0][0] == 10
    assert saved["baseline"] is None
    last = torch.load(tmp_path / "step_000040.ckpt", weights_only=True)["callbacks"]["GateMonitor"]
    assert last["baseline"][0] == 10


def test_accumulated_batches_are_one_step():
    logged = fit(Module(healthy), monitor(), accumulate_grad_batches=2, max_steps=22)
    assert list(logged) == [21]


def test_without_gates_it_says_so_and_is_idle(caplog):
    module = Module(healthy)
    del module.gate
    with caplog.at_level(logging.INFO):
        assert not fit(module, monitor())
    assert "Module has no gates to watch" in caplog.text


def test_gates_without_statistics_are_refused():
    module = Module(healthy)
    module.step_metrics = None  # type: ignore[assignment]
    module.on_train_batch_end = lambda *args: None  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=r"gate_token_std.*Module wrote none at step 10"):
        fit(module, monitor())


def test_several_ranks_decide_by_their_mean(monkeypatch):
    """The other rank's gates are all zero: half of the mean is left."""
    reduced: list[Tensor] = []
    monkeypatch.setattr(distributed, "all_reduce", reduced.append)
    module = Module(healthy)
    module.step_metrics.append(
        10, dict.fromkeys([f"gate_{n}" for n in gate_statistics(gates())._fields], 1.0)
    )
    trainer: Any = SimpleNamespace(global_step=0, world_size=2, loggers=[])
    watching = monitor()
    watching.on_train_start(trainer, module)
    trainer.global_step = 10
    (waiting,) = watching.state_dict()["pending"]
    assert len(reduced) == 1
    assert waiting == [10, [0.5] * 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "shout"}, "action must be warn or stop"),
        ({"baseline_step": 0}, "baseline_step"),
        ({"baseline_step": 20}, "baseline_step 20 and check_from 20"),
        ({"every_n_steps": 0}, "every_n_steps"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        monitor(**settings)


class ForbidSynchronisation(Callback):
    """Any wait for the device between two batches is an error."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_step_waits_for_the_device():
    def on_device(step: int) -> Tensor:
        return torch.rand(2, 12, 2, device="cuda")

    module = Module(on_device, capacity=1000)
    try:
        logged = fit(
            module, monitor(action="warn", least_gain=-1.0), ForbidSynchronisation(), accelerator="cuda"
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(logged) == len(CHECKED)
