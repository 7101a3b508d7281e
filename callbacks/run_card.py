"""What a run is, as a page of text beside its curves."""

import platform
import subprocess
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from theria.attention import recorded_backends

TAG = "run/card"
UNKNOWN = "unknown"
_PACKAGES = ("torch", "lightning", "triton")


class RunCard(Callback):
    """Writes ``run/card`` to TensorBoard's text: what runs, of which commit, on what.

    The commit is that of the repository these sources are in, marked where tracked files differ from it, and
    unknown outside of one. The attention backends are those that took the calls of the first training batch,
    so where ``auto`` was configured, what it came to. The configuration is the command line's, or without one
    the hyper-parameters of the module.

    A run that is resumed adds a card at its step. Only rank zero writes, after its first batch.
    """

    def __init__(self) -> None:
        self._recording = ExitStack()
        self._backends: set[str] | None = None
        self._start = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen to which backends attention takes."""
        if trainer.is_global_zero and _writers(trainer):
            self._backends = self._recording.enter_context(recorded_backends())
            self._start = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the card after the first batch."""
        if self._backends is None:
            return
        self._recording.close()
        backends, self._backends = self._backends, None
        text = card(trainer, pl_module, backends)
        for writer in _writers(trainer):
            writer.add_text(TAG, text, self._start)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._recording.close()
        self._backends = None


def card(trainer: Trainer, pl_module: LightningModule, backends: set[str]) -> str:
    """The card, in Markdown."""
    asked = pl_module.hparams.get("backend")
    attention = ", ".join(sorted(backends)) or "none of theria's"
    rows = {
        "module": type(pl_module).__name__,
        "commit": commit_of(Path(__file__).parent),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "device": _device(trainer),
        "precision": str(trainer.precision),
        "attention": attention if asked is None else f"{attention} (configured: {asked})",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| run | |\n| --- | --- |\n{table}\n```yaml\n{_configuration(trainer, pl_module)}```\n"


def commit_of(directory: Path) -> str:
    """The commit of the repository that tracks a directory's files, with ``-dirty`` where they differ."""
    git = ["git", "-C", str(directory)]
    try:
        # an installed package may lie inside somebody else's repository
        if not _said([*git, "ls-files", "."]):
            return UNKNOWN
        return _said([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return f"{trainer.world_size} x {device.type} {name or platform.machine()}"


def _configuration(trainer: Trainer, pl_module: LightningModule) -> str:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its body
    for callback in callbacks:
        if isinstance(callback, SaveConfigCallback):
            text: str = callback.parser.dump(callback.config, skip_none=False)
            return text
    return "".join(f"{name}: {value}\n" for name, value in pl_module.hparams.items())


def _writers(trainer: Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
