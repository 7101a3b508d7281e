"""A run that goes on from any checkpoint does what the uninterrupted one did next.

That is: the same batches, validations, hooks and random numbers, under the same step of the loggers.
"""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything

from callbacks import ResumableCheckpoint, RNGState
from datamodules.loader import BatchIndex, ResumableLoader, Shard

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # the loops run without a logger, and thirteen steps are few
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]

EPOCH = 5
SCHEDULES: list[dict[str, Any]] = [
    {"max_steps": 13},
    {"max_epochs": 3},
    {"max_epochs": 3, "check_val_every_n_epoch": 2},
    {"max_steps": 13, "check_val_every_n_epoch": None, "val_check_interval": 3},
    {"max_steps": 13, "check_val_every_n_epoch": None, "val_check_interval": 5},
    {"max_epochs": 3, "val_check_interval": 2},
    {"max_epochs": 3, "val_check_interval": 0.4},
    {"max_steps": 11, "val_check_interval": 1},
    {"max_steps": 13, "limit_val_batches": 0},
    {"max_epochs": 3, "limit_val_batches": 0},
    {"max_steps": 13, "limit_train_batches": 3},
    {"max_epochs": 4, "limit_train_batches": 3, "val_check_interval": 3},
]
Event = tuple[Any, ...]


class Sampler:
    """What Lightning tells the epoch to."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(())


class Loader:
    """Numbers in order. Making an iterator draws from torch's global generator, as DataLoader's does."""

    batch_sampler = None

    def __init__(self, length: int) -> None:
        self.length = length
        self.sampler = Sampler()

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[torch.Tensor]:
        torch.rand(1)
        return (torch.tensor([batch]) for batch in range(self.length))


class LoaderWithinEpoch(Loader):
    """A loader that knows its position in the epoch and leaves the epoch's number to Lightning."""

    position = 0
    first = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        first, self.first = self.first, 0
        return self._read(first)

    def _read(self, first: int) -> Iterator[torch.Tensor]:
        self.position = first
        for batch in range(first, self.length):
            self.position = batch + 1
            yield torch.tensor([self.sampler.epoch * self.length + batch])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.first = state_dict["position"]


class Numbers:
    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index: BatchIndex) -> torch.Tensor:
        return torch.tensor([index.epoch * EPOCH + index.ids.start])


class Data(LightningDataModule):
    """Training batches are the numbers from 0 on, through all epochs."""

    def __init__(self, endless: bool) -> None:
        super().__init__()
        self.endless = endless
        self.train: ResumableLoader | LoaderWithinEpoch | None = None

    def train_dataloader(self) -> ResumableLoader | LoaderWithinEpoch:
        if self.train is None:
            shard = Shard(EPOCH, 1)
            self.train = (
                ResumableLoader(Numbers(), shard, trainer=self.trainer)
                if self.endless
                else LoaderWithinEpoch(EPOCH)
            )
        return self.train

    def val_dataloader(self) -> Loader:
        return Loader(2)

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train.state_dict()} if self.train and self.endless else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_dataloader().load_state_dict(state_dict["train"])


class Recorder(LightningModule):
    """Trains a weight by numbers and records everything that happens, with the loggers' step."""

    def __init__(self, manual: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.events: list[Event] = []

    def record(self, what: str, *values: Any) -> None:
        loop = self.trainer.fit_loop.epoch_loop
        self.events.append((what, self.trainer.current_epoch, loop._batches_that_stepped, *values))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight - batch.sin()).square().sum() * torch.rand(())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        drawn = (random.random(), np.random.rand())  # noqa: NPY002
        self.record("train", int(batch), batch_idx, self.weight.tolist(), *drawn)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.record("validate", int(batch), batch_idx, float(torch.rand(())))

    def on_train_epoch_start(self) -> None:
        self.record("epoch start")

    def on_train_epoch_end(self) -> None:
        self.record("epoch end", float(torch.rand(())))


class Marker(Callback):
    """How many events had happened when a step was saved."""

    def __init__(self) -> None:
        self.events_at: dict[int, int] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.events_at[trainer.global_step] = len(pl_module.events)


class At(Callback):
    """Does something once, in one hook after one step."""

    def __init__(self, hook: str, step: int, action: Callable[[Trainer], None]) -> None:
        self.step = step
        self.action = action
        setattr(self, hook, self._act)

    def _act(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            self.step = -1
            self.action(trainer)


def run(
    directory: Path,
    resumed_from: Path | None = None,
    *,
    every: int = 1,
    endless: bool = True,
    manual: bool = True,
    extra: Callback | None = None,
    **schedule: Any,
) -> tuple[list[Event], dict[int, int]]:
    seed_everything(0, verbose=False)
    module, marker = Recorder(manual), Marker()
    checkpoint = ResumableCheckpoint(every, keep_last=1000, dirpath=str(directory))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RNGState(), marker, *([extra] if extra else []), checkpoint],
        **schedule,
    )
    try:
        trainer.fit(module, Data(endless), ckpt_path=resumed_from)
    except SystemExit:
        assert extra is not None
    return module.events, marker.events_at


def newest(directory: Path) -> tuple[Path, int]:
    path = max(directory.glob("*.ckpt"))
    return path, int(path.stem.removeprefix("step_"))


def assert_goes_on(
    resumed: list[Event], events: list[Event], events_at: dict[int, int], step: int, schedule: dict[str, Any]
) -> None:
    left = events[events_at[step] :]
    if step == schedule.get("max_steps"):
        assert [event[0] for event in left] == ["epoch end"]
        left = []  # a run that has reached its last step does nothing more
    assert resumed == left, step


@pytest.mark.parametrize(
    ("schedule", "endless"),
    [*((schedule, True) for schedule in SCHEDULES), *((schedule, False) for schedule in SCHEDULES[::3])],
    ids=str,
)
def test_every_checkpoint_goes_on_exactly(tmp_path: Path, schedule: dict[str, Any], endless: bool) -> None:
    events, events_at = run(tmp_path / "whole", endless=endless, **schedule)
    assert len(events_at) == max(event[2] for event in events if event[0] == "train") + 1
    for step in events_at:
        first = tmp_path / f"from_{step}"
        again, again_at = run(
            first, tmp_path / "whole" / f"step_{step:06d}.ckpt", endless=endless, every=2, **schedule
        )
        assert_goes_on(again, events, events_at, step, schedule)
        if step in (3, 5) and again_at:
            path, later = newest(first)
            third, _ = run(tmp_path / f"then_from_{step}", path, endless=endless, **schedule)
            assert_goes_on(third, events, events_at, later, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES[:6:2], ids=str)
def test_automatic_optimisation_goes_on_exactly_too(tmp_path: Path, schedule: dict[str, Any]) -> None:
    events, events_at = run(tmp_path, manual=False, **schedule)
    for step in events_at:
        again, _ = run(tmp_path / str(step), tmp_path / f"step_{step:06d}.ckpt", manual=False, **schedule)
        assert_goes_on(again, events, events_at, step, schedule)


@pytest.mark.parametrize(
    "validation",
    [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}],
    ids=str,
)
@pytest.mark.parametrize("end", [{"max_steps": 4}, {"max_steps": 5}, {"max_epochs": 2}], ids=str)
def test_a_finished_run_goes_on_as_a_longer_one(
    tmp_path: Path, end: dict[str, Any], validation: dict[str, Any]
) -> None:
    longer = {"max_steps": 13} if "max_steps" in end else {"max_epochs": 3}
    events, _ = run(tmp_path / "whole", every=100, **longer, **validation)
    start, start_at = run(tmp_path / "start", every=100, **end, **validation)
    path, step = newest(tmp_path / "start")
    rest, _ = run(tmp_path / "rest", path, every=100, **longer, **validation)
    assert start[: start_at[step]] + rest == events


def send_sigterm(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


EACH_EPOCH, EVERY_SECOND = {"max_steps": 13}, {"max_epochs": 3, "val_check_interval": 2}


@pytest.mark.parametrize(
    ("hook", "step", "schedule", "endless"),
    [
        *[
            (hook, step, schedule, True)
            for hook in ("on_train_batch_start", "on_train_batch_end")
            for step in (3, 4, 5)
            for schedule in (EACH_EPOCH, EVERY_SECOND)
        ],
        ("on_validation_batch_end", 5, EACH_EPOCH, True),
        ("on_validation_batch_end", 4, EVERY_SECOND, True),
        ("on_validation_end", 5, EACH_EPOCH, True),
        ("on_validation_end", 4, EVERY_SECOND, True),
        ("on_train_epoch_end", 5, EACH_EPOCH, True),
        ("on_train_epoch_end", 5, EACH_EPOCH, False),
        ("on_train_epoch_end", 5, EVERY_SECOND, True),
        ("on_train_epoch_end", 5, EVERY_SECOND, False),
    ],
    ids=str,
)
def test_sigterm_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path, hook: str, step: int, schedule: dict[str, Any], endless: bool
) -> None:
    interruption = At(hook, step, send_sigterm)
    options: dict[str, Any] = {"every": 100, "endless": endless, **schedule}
    events, _ = run(tmp_path / "whole", **options)
    cut, cut_at = run(tmp_path / "cut", extra=interruption, **options)
    assert interruption.step == -1
    path, saved = newest(tmp_path / "cut")
    assert saved == [event[2] + 1 for event in cut if event[0] == "train"][-1]
    rest, _ = run(tmp_path / "rest", path, **options)
    assert cut[: cut_at[saved]] + rest == without_part_of_a_validation(cut, cut_at[saved], events)


def without_part_of_a_validation(cut: list[Event], saved_at: int, events: list[Event]) -> list[Event]:
    """The uninterrupted events, with the batches that an interrupted validation repeats."""
    done = next((index for index in range(saved_at, 0, -1) if cut[index - 1][0] != "validate"), saved_at)
    begun = cut[done:saved_at]
    whole_validation = begun and events[saved_at : saved_at + 1] and events[saved_at][0] != "validate"
    return events[:done] + ([] if whole_validation else begun) + events[done:]


def test_ctrl_c_inside_a_validation_leaves_a_checkpoint(tmp_path: Path) -> None:
    def interrupt(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    schedule = {"max_epochs": 3}
    events, _ = run(tmp_path / "whole", every=100, **schedule)
    handler = signal.getsignal(signal.SIGINT)
    try:
        run(tmp_path / "cut", every=100, extra=At("on_validation_batch_end", 10, interrupt), **schedule)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    path, step = newest(tmp_path / "cut")
    assert step == 10
    rest, _ = run(tmp_path / "rest", path, every=100, **schedule)
    validated = [index for index, event in enumerate(events) if event[0] == "validate"]
    assert rest == events[validated[2] :]


def test_an_error_in_a_step_leaves_none(tmp_path: Path) -> None:
    def fail(trainer: Trainer) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        run(tmp_path, every=100, extra=At("on_train_batch_end", 4, fail), max_steps=13)
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("step", [3, 5])
def test_being_told_to_stop_off_schedule_goes_on_exactly(tmp_path: Path, step: int) -> None:
    def stop(trainer: Trainer) -> None:
        trainer.should_stop = True

    schedule = {"max_epochs": 3, "val_check_interval": 2}
    events, _ = run(tmp_path / "whole", every=100, **schedule)
    start, _ = run(tmp_path / "start", every=100, extra=At("on_train_batch_end", step, stop), **schedule)
    path, saved = newest(tmp_path / "start")
    assert saved == step
    rest, _ = run(tmp_path / "rest", path, every=100, **schedule)
    # the validation that comes with the stop draws numbers that the uninterrupted run does not
    start, rest, events = ([without_numbers(event) for event in part] for part in (start, rest, events))
    trained = [event for event in events if event[0] == "train"]
    assert [event for event in start + rest if event[0] == "train"] == trained
    later = [event for event in rest if event[0] != "train"]
    assert later == [event for event in events if event[0] != "train"][-len(later) :]


def without_numbers(event: Event) -> Event:
    return tuple(value for value in event if not isinstance(value, float | list))
