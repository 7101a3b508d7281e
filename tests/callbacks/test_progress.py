"""The bar counts steps to the end of training and reads metrics only where they are logged."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from callbacks import ResumableCheckpoint, StepProgressBar

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # a few numbers need no workers, and the position in them is not the subject
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning"),
]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.ones(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight * batch).sum())
        optimizer.step()
        self.log("train/loss", float(self.global_step), prog_bar=True)


class Recorded(StepProgressBar):
    """Notes the bar's place after every step, and every reading of the metrics."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.places: list[tuple[int, float, str]] = []
        self.read: list[dict[str, Any]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if self.is_enabled:
            bar = self.train_progress_bar
            self.places.append((int(bar.completed), float(bar.total or 0), bar.description.strip()))

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        self.read.append(super().get_metrics(*args))
        return self.read[-1]


def fit(
    directory: Path, resumed_from: Path | None = None, bar: Recorded | None = None, **options: Any
) -> Recorded:
    bar = bar or Recorded()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        logger=False,
        enable_model_summary=False,
        callbacks=[bar, ResumableCheckpoint(3)],
        **options,
    )
    trainer.fit(Module(), DataLoader(torch.arange(1.0, 6.0)), ckpt_path=resumed_from)
    return bar


def test_it_counts_steps_through_the_epochs(tmp_path: Path) -> None:
    bar = fit(tmp_path, max_steps=8, log_every_n_steps=3)
    assert bar.places == [(step, 8, "Steps") for step in range(1, 9)]
    assert len(bar.progress.tasks) == 1  # type: ignore[union-attr]


def test_it_goes_on_where_the_run_was_left(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=6, log_every_n_steps=3)
    bar = fit(tmp_path, tmp_path / "checkpoints" / "step_000003.ckpt", max_steps=8, log_every_n_steps=3)
    assert [place[0] for place in bar.places][-5:] == list(range(4, 9))


def test_metrics_are_read_on_logged_steps_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    bar = fit(tmp_path, max_steps=8, log_every_n_steps=3)
    assert [metrics["loss"] for metrics in bar.read] == [3.0, 5.0, 6.0, 8.0]
    assert all(set(metrics) == {"loss"} for metrics in bar.read)


def test_without_max_steps_it_counts_epochs(tmp_path: Path) -> None:
    bar = fit(tmp_path, max_epochs=2, log_every_n_steps=3)
    assert [place[:2] for place in bar.places] == [(batch, 5) for batch in (1, 2, 3, 4, 5)] * 2
    assert [place[2] for place in bar.places] == ["Epoch 0/1"] * 5 + ["Epoch 1/1"] * 5


def test_it_can_be_off(tmp_path: Path) -> None:
    assert fit(tmp_path, bar=Recorded(refresh_rate=0), max_steps=3, log_every_n_steps=1).places == []


def test_it_shows_loss_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: screen)
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **options: None
    )
    fit(tmp_path, max_steps=8, log_every_n_steps=1)
    assert "8/8" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "loss: 8.000" in screen.file.getvalue()  # type: ignore[attr-defined]
