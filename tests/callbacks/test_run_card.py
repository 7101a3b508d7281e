"""What a run's card says, beside what is so."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from callbacks import RunCard, run_card
from lightning_modules.loggers import RunTensorBoardLogger
from theria.attention import reference_attention, registered_backend, scaled_dot_product_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]


class Attends(LightningModule):
    """Calls attention with the given backends, one a batch."""

    def __init__(self, *backends: str, fails: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters({"backend": "auto", "width": 4})
        self.backends = backends
        self.fails = fails
        self.weight = torch.nn.Parameter(torch.ones(3, 4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("broken")
        if not self.backends:
            return self.weight.sum()
        name = self.backends[batch_idx % len(self.backends)]
        return scaled_dot_product_attention(self.weight, self.weight, self.weight, backend=name).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: LightningModule, directory: Path, *, logger: bool = True) -> list[str]:
    """Cards that a training leaves."""
    trainer = Trainer(
        logger=RunTensorBoardLogger(str(directory)) if logger else False,
        callbacks=[RunCard()],
        accelerator="cpu",
        max_steps=3,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.zeros(3)))
    if not logger:
        return []
    events = EventAccumulator(str(directory)).Reload()
    tag = f"{run_card.TAG}/text_summary"
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]


def row(card: str, name: str) -> str:
    (line,) = (line for line in card.splitlines() if line.startswith(f"| {name} |"))
    return line.split("|")[2].strip()


def test_the_card_tells_what_the_process_is(tmp_path: Path) -> None:
    (card,) = fit(Attends("auto"), tmp_path)
    assert row(card, "module") == "Attends"
    assert row(card, "torch") == torch.__version__
    assert row(card, "python") == sys.version.split()[0]
    assert row(card, "device").startswith("1 x cpu ")
    assert row(card, "precision") == "32-true"
    assert card.endswith("```yaml\nbackend: auto\nwidth: 4\n```\n")


def test_the_backend_is_the_one_that_took_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (card,) = fit(Attends("auto"), tmp_path / "a")
    assert row(card, "attention") == "reference (configured: auto)"
    # and not a guess: another that auto looks for takes them where it is there
    monkeypatch.setattr("theria.attention.registry._FASTEST_FIRST", ("mine",))
    with registered_backend("mine", reference_attention):
        (card,) = fit(Attends("auto"), tmp_path / "b")
    assert row(card, "attention") == "mine (configured: auto)"
    (card,) = fit(Attends(), tmp_path / "c")
    assert row(card, "attention") == "none of theria's (configured: auto)"


def test_it_listens_to_the_first_batch_alone(tmp_path: Path) -> None:
    from theria.attention import api

    (card,) = fit(Attends("custom", "reference"), tmp_path)
    assert row(card, "attention") == "custom (configured: auto)"
    assert not api._records
    with pytest.raises(RuntimeError, match="broken"):
        fit(Attends(fails=True), tmp_path / "broken")
    assert not api._records
    assert fit(Attends("auto"), tmp_path / "nowhere", logger=False) == []


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    done = subprocess.run(
        ["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_is_marked_where_sources_differ(tmp_path: Path) -> None:
    source = tmp_path / "package"
    source.mkdir()
    (source / "code.py").write_text("1")
    assert run_card.commit_of(source) == "unknown"
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "empty", "--allow-empty")
    # inside somebody's repository, which does not track it
    assert run_card.commit_of(source) == "unknown"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "tag", "-am", "tagged", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert run_card.commit_of(source) == commit
    (tmp_path / "notes.txt").write_text("untracked")
    assert run_card.commit_of(source) == commit
    (source / "code.py").write_text("2")
    assert run_card.commit_of(source) == f"{commit}-dirty"


def test_the_commit_is_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_card.commit_of(Path(__file__).parent) == "unknown"


def test_a_package_that_is_absent_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_card._version("no-such-package") == "not installed"
