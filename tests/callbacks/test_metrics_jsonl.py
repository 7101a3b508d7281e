import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from callbacks import MetricsJSONL, read_metrics
from lightning_modules.step_metrics import StepMetrics

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:You defined a `validation_step` but have no:UserWarning"
    ),  # as meant here
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers:UserWarning"
    ),  # four numbers need no workers
    # the state after the optimiser's step is the one these checkpoints are meant to hold
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]


class Line(LightningModule):
    """Fits a number by manual optimisation; ``seen`` keeps the loss of every step it takes."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[tuple[int, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = (self.weight - batch[0].mean()).square()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.seen.append((self.trainer.global_step, loss.item()))
        self.record(loss)
        if self.trainer.global_step == self.fail_at:
            raise ArithmeticError("boom")

    def record(self, loss: Tensor) -> None:
        raise NotImplementedError

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", (self.weight - batch[0].mean()).square())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Buffered(Line):
    """Keeps its rows in a StepMetrics buffer, as MetaSeqClassifier does."""

    def __init__(self, fail_at: int | None = None, capacity: int = 100) -> None:
        super().__init__(fail_at)
        self.step_metrics = StepMetrics(capacity)

    def record(self, loss: Tensor) -> None:
        self.step_metrics.append(self.trainer.global_step, {"loss": loss, "seconds": 0.5})


class Logging(Line):
    """Has no buffer, only ``self.log``."""

    def record(self, loss: Tensor) -> None:
        self.log("loss", loss)
        if self.trainer.global_step % 3 == 0:
            self.log("thirds", 2 * loss.detach())
        self.log("epoch_mean", loss, on_step=False, on_epoch=True)


MODULES = pytest.mark.parametrize("module_class", [Buffered, Logging])


class SaveAt(Callback):
    """Saves one checkpoint; stands before the writer in the list of callbacks, as any callback may."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def loader(batches: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.arange(2.0 * batches)), batch_size=2)


def make_trainer(directory: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(default_root_dir=directory, callbacks=list(callbacks), **(defaults | options))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_lines(path: Path) -> list[tuple[int, int]]:
    return [(r["attempt"], r["step"]) for r in lines(path) if r["kind"] == "train"]


@MODULES
def test_every_step_is_one_record_with_what_the_module_saw(tmp_path: Path, module_class: type[Line]) -> None:
    module, began = module_class(), time.time()
    make_trainer(tmp_path, MetricsJSONL()).fit(module, loader(7))
    table = read_metrics(tmp_path / "metrics.jsonl")
    assert list(zip(table["step"], table["loss"], strict=True)) == module.seen
    assert len(table) == 7
    assert set(table["attempt"]) == {1}
    assert table["timestamp"].is_monotonic_increasing
    assert table["timestamp"].is_unique
    assert began <= table["timestamp"].iloc[0]
    assert table["timestamp"].iloc[-1] <= time.time()


def test_rows_of_a_buffer_are_written_in_blocks_of_its_capacity(tmp_path: Path) -> None:
    written = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            written.append(len(train_lines(tmp_path / "rows.jsonl")))

    make_trainer(tmp_path, MetricsJSONL("rows.jsonl"), Watch()).fit(Buffered(capacity=3), loader(8))
    assert written == [0, 0, 3, 3, 3, 6, 6, 6]
    assert len(train_lines(tmp_path / "rows.jsonl")) == 8


def test_logged_scalars_are_read_and_written_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, transfers, tolist = [], [], Tensor.tolist

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            written.append(len(train_lines(tmp_path / "metrics.jsonl")))

    monkeypatch.setattr(Tensor, "tolist", lambda tensor: transfers.append(len(tensor)) or tolist(tensor))
    make_trainer(tmp_path, MetricsJSONL(flush_every=4), Watch()).fit(Logging(), loader(7))
    assert written == [0, 0, 0, 4, 4, 4, 4]
    assert transfers == [4 + 1, 3 + 1]  # a loss a step, and thirds at steps 3 and 6


def test_a_logged_scalar_belongs_to_the_steps_that_log_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MetricsJSONL(), max_epochs=2, val_check_interval=2)
    module = Logging()
    trainer.fit(module, loader(4), loader(1))
    records = [r for r in lines(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    fields = [sorted(r.keys() - {"kind", "attempt", "step", "timestamp"}) for r in records]
    assert fields == [["loss", "thirds"] if step % 3 == 0 else ["loss"] for step in range(1, 9)]
    assert [r["thirds"] for r in records if "thirds" in r] == [2 * module.seen[2][1], 2 * module.seen[5][1]]


def test_a_step_of_several_batches_is_one_record(tmp_path: Path) -> None:
    class Accumulating(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.log("batch", float(batch_idx))
            return (self.weight - batch[0].mean()).square()

        configure_optimizers = Line.configure_optimizers

    trainer = make_trainer(tmp_path, MetricsJSONL(), accumulate_grad_batches=3, max_epochs=2)
    trainer.fit(Accumulating(), loader(6))
    table = read_metrics(tmp_path / "metrics.jsonl")
    assert list(zip(table["step"], table["batch"], strict=True)) == [(1, 2), (2, 5), (3, 2), (4, 5)]


@MODULES
def test_validation_results_stand_between_the_steps(tmp_path: Path, module_class: type[Line]) -> None:
    weights = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            weights.append(pl_module.weight.item())

    trainer = make_trainer(tmp_path, MetricsJSONL(), Watch(), val_check_interval=2, num_sanity_val_steps=1)
    trainer.fit(module_class(), loader(5), loader(1))
    path = tmp_path / "metrics.jsonl"
    assert [(r["kind"], r["step"]) for r in lines(path)] == [
        ("attempt", 0),
        ("train", 1),
        ("train", 2),
        ("validation", 2),
        ("train", 3),
        ("train", 4),
        ("validation", 4),
        ("train", 5),
    ]
    validation = read_metrics(path, kind="validation")
    assert list(validation.columns) == ["step", "attempt", "timestamp", "val/loss"]
    assert list(validation["val/loss"]) == pytest.approx([(w - 0.5) ** 2 for w in weights[1:]], rel=1e-6)
    trainer.validate(module_class(), loader(1), verbose=False)
    assert len(lines(path)) == 8


@MODULES
def test_every_step_of_a_checkpoint_is_on_the_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module_class: type[Line]
) -> None:
    path, saves = tmp_path / "metrics.jsonl", []
    synced_size, fsync = 0, os.fsync

    def remember_size(descriptor: int) -> None:
        nonlocal synced_size
        fsync(descriptor)
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            synced_size = path.stat().st_size

    monkeypatch.setattr(os, "fsync", remember_size)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1)
    trainer = make_trainer(tmp_path, SaveAt(5, tmp_path / "early.ckpt"), MetricsJSONL(), checkpoint)

    def check_then_save(content: dict[str, Any], *_: Any, **__: Any) -> None:
        assert list(read_metrics(path)["step"]) == list(range(1, content["global_step"] + 1))
        assert synced_size == path.stat().st_size
        saves.append(content["global_step"])

    monkeypatch.setattr(trainer.strategy, "save_checkpoint", check_then_save)
    module = module_class()
    trainer.fit(module, loader(7))
    assert saves == [3, 5, 6]
    table = read_metrics(path)
    assert list(zip(table["step"], table["loss"], strict=True)) == module.seen
    assert len(train_lines(path)) == 7


# which batches a resumed run sees is the loader's subject, not the record's
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning")
@MODULES
def test_a_crash_and_a_resume_leave_every_step_once(tmp_path: Path, module_class: type[Line]) -> None:
    path, checkpoint = tmp_path / "metrics.jsonl", tmp_path / "step3.ckpt"
    crashing = module_class(fail_at=5)
    with pytest.raises(ArithmeticError, match="boom"):
        make_trainer(tmp_path, SaveAt(3, checkpoint), MetricsJSONL()).fit(crashing, loader(8))
    assert train_lines(path) == [(1, step) for step in range(1, 6)]
    path.write_bytes(path.read_bytes()[:-20])
    resumed = module_class()
    trainer = make_trainer(tmp_path, MetricsJSONL())
    trainer.fit(resumed, loader(8), ckpt_path=str(checkpoint), weights_only=True)
    assert [r["step"] for r in lines_of_kind(path, "attempt")] == [0, 3]
    table = read_metrics(path)
    assert list(table["step"]) == list(range(1, 9))
    assert list(table["attempt"]) == [1] * 3 + [2] * 5
    assert list(table["loss"]) == [loss for _, loss in crashing.seen[:3] + resumed.seen]


def lines_of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    whole = (line for line in path.read_text().splitlines() if line.endswith("}"))
    return [record for record in map(json.loads, whole) if record["kind"] == kind]


@MODULES
def test_a_second_fit_records_no_step_twice(tmp_path: Path, module_class: type[Line]) -> None:
    writer, module = MetricsJSONL(), module_class(fail_at=2)
    with pytest.raises(ArithmeticError, match="boom"):
        make_trainer(tmp_path, writer).fit(module, loader(3))
    module.fail_at = None
    for _ in range(2):
        make_trainer(tmp_path, writer).fit(module, loader(3))
    expected = [(1, 1), (1, 2)] + [(attempt, step) for attempt in (2, 3) for step in (1, 2, 3)]
    assert train_lines(tmp_path / "metrics.jsonl") == expected
    if isinstance(module, Buffered):
        assert module.step_metrics._subscribers == []


@MODULES
def test_a_rollback_opens_a_new_attempt(tmp_path: Path, module_class: type[Line]) -> None:
    writer = MetricsJSONL()

    class Rollback(Callback):
        done = False

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4 and not self.done:
                self.done = True
                progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
                progress.total.completed = 2
                writer.start_attempt()

    make_trainer(tmp_path, writer, Rollback()).fit(module_class(), loader(7))
    path = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in lines_of_kind(path, "attempt")] == [0, 2]
    assert train_lines(path) == [(1, step) for step in (1, 2, 3, 4)] + [(2, step) for step in (3, 4, 5)]
    table = read_metrics(path)
    assert list(table["step"]) == [1, 2, 3, 4, 5]
    assert list(table["attempt"]) == [1, 1, 2, 2, 2]
    assert table["timestamp"].is_monotonic_increasing


def test_a_rollback_needs_a_running_fit(tmp_path: Path) -> None:
    writer = MetricsJSONL()
    with pytest.raises(RuntimeError, match=r"MetricsJSONL\.start_attempt needs a running fit"):
        writer.start_attempt()
    make_trainer(tmp_path, writer).fit(Buffered(), loader(1))
    with pytest.raises(RuntimeError, match="needs a running fit"):
        writer.start_attempt()


def test_a_device_that_fails_does_not_hide_what_failed_first(tmp_path: Path) -> None:
    module = Buffered(fail_at=2)

    class Broken(StepMetrics):
        def flush(self, *, reduce: bool = True) -> None:
            if len(self):
                raise RuntimeError("device-side assert")

    module.step_metrics = Broken()
    with (
        pytest.warns(
            UserWarning, match=r"last block of steps is missing in .*metrics\.jsonl: device-side assert"
        ),
        pytest.raises(ArithmeticError, match="boom"),
    ):
        make_trainer(tmp_path, writer := MetricsJSONL()).fit(module, loader(3))
    assert writer._file is None  # and closed
    assert read_metrics(tmp_path / "metrics.jsonl").empty


def test_after_an_exception_no_other_rank_is_waited_for(tmp_path: Path) -> None:
    module, reduced = Buffered(fail_at=4), []

    def reduce(block: Tensor) -> Tensor:
        reduced.append(len(block))
        return 2 * block

    module.step_metrics.reduce = reduce
    with pytest.raises(ArithmeticError, match="boom"):
        make_trainer(tmp_path, MetricsJSONL(), val_check_interval=3).fit(module, loader(6), loader(1))
    assert reduced == [3]
    losses = [loss for _, loss in module.seen]
    expected = [2 * loss for loss in losses[:3]] + losses[3:]
    assert list(read_metrics(tmp_path / "metrics.jsonl")["loss"]) == pytest.approx(expected, rel=1e-6)


@MODULES
def test_other_ranks_flush_along_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module_class: type[Line]
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda trainer: False))
    module, reduced = module_class(), []
    if isinstance(module, Buffered):
        module.step_metrics.reduce = lambda block: reduced.append(len(block)) or block
    make_trainer(tmp_path, MetricsJSONL(), val_check_interval=2).fit(module, loader(5), loader(1))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert reduced == ([2, 2, 1] if isinstance(module, Buffered) else [])


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    make_trainer(tmp_path, MetricsJSONL(), fast_dev_run=True).fit(Buffered(), loader(3))
    assert list(tmp_path.iterdir()) == []


def test_no_directory_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "log_dir", property(lambda trainer: None))
    module = Buffered()
    with pytest.raises(
        ValueError, match=r"MetricsJSONL has no directory for metrics\.jsonl: trainer\.log_dir is None"
    ):
        make_trainer(tmp_path, MetricsJSONL()).fit(module, loader(3))
    assert module.seen == []


@pytest.mark.parametrize("flush_every", [0, -1, 2.0, True])
def test_flush_every_is_checked(flush_every: object) -> None:
    with pytest.raises(ValueError, match="flush_every must be an integer from 1 on"):
        MetricsJSONL(flush_every=flush_every)  # type: ignore[arg-type]
    if flush_every != 0:
        with pytest.raises(ValueError, match="line_every_n_steps must be an integer from 0 on"):
            MetricsJSONL(line_every_n_steps=flush_every)  # type: ignore[arg-type]


@MODULES
def test_fields_of_other_callbacks_stand_in_the_records_of_their_steps(
    tmp_path: Path, module_class: type[Line]
) -> None:
    class Counts(Callback):
        """Knows a step once its batch has ended, which a full buffer does not wait for."""

        def __init__(self) -> None:
            self.known: set[int] = set()

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.known.add(trainer.global_step)

        def step_fields(self, step: int) -> dict[str, float]:
            return {"square": float(step**2), "loss": -1.0} if step in self.known else {}

    module = module_class(capacity=3) if module_class is Buffered else module_class()
    make_trainer(tmp_path, Counts(), MetricsJSONL(flush_every=3)).fit(module, loader(8))
    table = read_metrics(tmp_path / "metrics.jsonl")
    assert table["square"].tolist() == [step**2 for step in range(1, 9)]
    assert list(zip(table["step"], table["loss"], strict=True)) == module.seen  # the module's own goes first
