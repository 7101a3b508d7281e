"""When checkpoints are written, which are kept, and what stands in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from callbacks import ResumableCheckpoint
from lightning_modules.checkpoint_io import AtomicCheckpointIO, check_primitive
from lightning_modules.loggers import RunCSVLogger

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # a few numbers need no workers, and the position in them is not the subject
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning"),
]


class Module(LightningModule):
    """Takes its own steps; validation n logs the n-th of the given scores."""

    def __init__(self, scores: Sequence[float] = (), name: str = "val/score") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.scores = list(scores)
        self.name = name

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight * batch).sum())
        optimizer.step()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        if self.scores and not self.trainer.sanity_checking:
            self.log(self.name, self.scores[self.trainer.global_step // 2 - 1])


def fit(
    directory: Path,
    checkpoint: ResumableCheckpoint,
    module: Module | None = None,
    extra: Sequence[Callback] = (),
    resumed_from: Path | None = None,
    **changes: Any,
) -> Trainer:
    options: dict[str, Any] = {
        "max_steps": 10,
        "val_check_interval": 2,
        "logger": False,
        "plugins": [AtomicCheckpointIO()],
    }
    trainer = Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[checkpoint, *extra],
        **(options | changes),
    )
    loaders = DataLoader(torch.arange(1.0, 21.0)), DataLoader(torch.ones(1))
    trainer.fit(module or Module(), *loaders, ckpt_path=resumed_from)
    return trainer


def saved(directory: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (directory / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("every", "end", "steps"),
    [
        (3, {}, [3, 6, 9, 10]),
        (4, {}, [4, 8, 10]),
        (100, {}, [10]),
        (7, {"max_steps": -1, "max_epochs": 1}, [7, 14, 20]),
    ],
)
def test_every_n_steps_and_the_last(
    tmp_path: Path, every: int, end: dict[str, int], steps: list[int]
) -> None:
    fit(tmp_path, ResumableCheckpoint(every, keep_last=10), **end)
    assert saved(tmp_path) == steps


def test_the_newest_are_kept(tmp_path: Path) -> None:
    fit(tmp_path, ResumableCheckpoint(1, keep_last=2))
    assert saved(tmp_path) == [9, 10]


@pytest.mark.parametrize(
    ("mode", "k", "kept", "best"),
    [("max", 1, [8, 10], 8), ("max", 2, [4, 8, 10], 8), ("min", 1, [6, 10], 6), ("min", 2, [6, 10], 6)],
)
def test_the_best_are_kept(tmp_path: Path, mode: Any, k: int, kept: list[int], best: int) -> None:
    scores = [float("nan"), 0.7, 0.1, 0.9, 0.3]
    checkpoint = ResumableCheckpoint(5, keep_last=1, monitor="val/score", mode=mode, save_top_k=k)
    trainer = fit(tmp_path, checkpoint, Module(scores))
    assert saved(tmp_path) == kept
    path = tmp_path / "checkpoints" / f"step_{best:06d}.ckpt"
    assert trainer.checkpoint_callback is checkpoint
    assert checkpoint.best_model_path == str(path)
    assert checkpoint.best_model_score == pytest.approx(scores[best // 2 - 1])
    assert checkpoint.last_model_path == str(tmp_path / "checkpoints" / "step_000010.ckpt")


def test_the_best_are_known_after_a_resume(tmp_path: Path) -> None:
    scores = [0.1, 0.9, 0.2, 0.3, 0.4]
    fit(tmp_path, ResumableCheckpoint(2, 1, "val/score", "max"), Module(scores), max_steps=6)
    assert saved(tmp_path) == [4, 6]
    checkpoint = ResumableCheckpoint(2, 1, "val/score", "max")
    resumed_from = tmp_path / "checkpoints" / "step_000006.ckpt"
    trainer = fit(tmp_path, checkpoint, Module(scores), resumed_from=resumed_from)
    assert saved(tmp_path) == [4, 10]
    assert checkpoint.best_model_path == str(tmp_path / "checkpoints" / "step_000004.ckpt")
    trainer.validate(dataloaders=DataLoader(torch.ones(1)), ckpt_path="best", verbose=False)


def test_without_a_monitor_there_is_no_best(tmp_path: Path) -> None:
    trainer = fit(tmp_path, ResumableCheckpoint(5))
    with pytest.raises(ValueError, match="best"):
        trainer.validate(dataloaders=DataLoader(torch.ones(1)), ckpt_path="best")


def test_what_others_keep_is_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / "checkpoints" / name for name in ("mine.ckpt", "step_000900.ckpt", "notes.txt")]
    others[0].parent.mkdir()
    for path in others:
        path.touch()
    fit(tmp_path, ResumableCheckpoint(2, keep_last=1))
    assert all(path.exists() for path in others)


def test_an_early_stop_is_saved(tmp_path: Path) -> None:
    stop = EarlyStopping("val/score", patience=1, mode="max", check_on_train_epoch_end=False)
    fit(tmp_path, ResumableCheckpoint(100), Module([0.9, 0.5, 0.4, 0.3, 0.2]), extra=[stop])
    assert saved(tmp_path) == [4]


def test_a_stop_at_an_epochs_end_is_saved(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    fit(tmp_path, ResumableCheckpoint(100), extra=[Stop()], max_steps=-1, max_epochs=3)
    assert saved(tmp_path) == [20]


def test_the_metrics_of_a_validation_are_there_at_the_epochs_end(tmp_path: Path) -> None:
    """A callback that reads them at the end of the epoch finds them after a resume in between."""
    seen: list[float] = []

    class Reader(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(float(trainer.callback_metrics["val/score"]))

    scores = [0.1, 0.2, 0.3, 0.4, 0.5]
    options = {"extra": [Reader()], "limit_train_batches": 4, "max_steps": -1}
    fit(tmp_path, ResumableCheckpoint(2, 9), Module(scores), max_epochs=2, **options)
    resumed_from = tmp_path / "checkpoints" / "step_000004.ckpt"
    fit(
        tmp_path,
        ResumableCheckpoint(2, 9),
        Module(scores),
        max_epochs=1,
        resumed_from=resumed_from,
        **options,
    )
    assert seen == pytest.approx([0.2, 0.4, 0.2])


def test_loggers_write_before_the_checkpoint(tmp_path: Path) -> None:
    rows_at: dict[int, int] = {}

    class Log(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.logger.log_metrics({"a": 1.0}, trainer.global_step - 1)  # type: ignore[union-attr]

    class Written(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            rows_at[checkpoint["global_step"]] = len((tmp_path / "metrics.csv").read_text().splitlines()) - 1
            super().save_checkpoint(checkpoint, path)

    options = {"logger": RunCSVLogger(str(tmp_path)), "plugins": [Written()], "log_every_n_steps": 20}
    fit(tmp_path, ResumableCheckpoint(3), extra=[Log()], **options)
    assert rows_at == {3: 3, 6: 6, 9: 9, 10: 10}


def test_a_checkpoint_holds_tensors_and_primitives(tmp_path: Path) -> None:
    checkpoint = ResumableCheckpoint(5, monitor="val/score")
    fit(tmp_path, checkpoint, Module([0.1] * 5))
    content = torch.load(checkpoint.last_model_path, weights_only=True)
    check_primitive(content)
    assert content["callbacks"][checkpoint.state_key] == {"scores": {"step_000002.ckpt": pytest.approx(0.1)}}


def test_several_of_them_agree(tmp_path: Path) -> None:
    """The counters are brought into their form once, however many of these are there."""
    one, other = (
        ResumableCheckpoint(4),
        ResumableCheckpoint(4, monitor="val/score", dirpath=str(tmp_path / "b")),
    )
    fit(tmp_path, one, Module([0.1] * 5), extra=[other], max_steps=4)
    first, second = (
        torch.load(path, weights_only=True) for path in (one.last_model_path, other.last_model_path)
    )
    assert first["loops"] == second["loops"]
    loops = first["loops"]["fit_loop"]
    assert loops["epoch_loop.state_dict"] == {"_batches_that_stepped": 3}
    assert (
        loops["epoch_loop.val_loop.batch_progress"]["total"]["ready"] == 0
    )  # it is done, not to be repeated


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, ResumableCheckpoint(1), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_an_unknown_metric_is_an_error(tmp_path: Path) -> None:
    checkpoint = ResumableCheckpoint(5, monitor="val/other")
    with pytest.raises(MisconfigurationException, match=r"monitors 'val/other'.*'val/score'"):
        fit(tmp_path, checkpoint, Module([0.1] * 5))


def test_validation_by_the_clock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="the clock"):
        fit(tmp_path, ResumableCheckpoint(5), val_check_interval="00:00:01:00")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps"),
        ({"every_n_steps": 2.5}, TypeError, "every_n_steps"),
        ({"keep_last": 0}, ValueError, "keep_last must be at least 1, got 0"),
        ({"save_top_k": 0}, ValueError, "save_top_k must be at least 1, got 0"),
        ({"mode": "best"}, ValueError, "mode must be min or max, got 'best'"),
    ],
)
def test_impossible_values_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ResumableCheckpoint(**options)
