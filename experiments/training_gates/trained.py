"""A run of `theria fit` from a configuration, and what gates ask of it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from lightning.pytorch import Callback

from callbacks import UnhealthyGatesError, UnhealthyTrainingError
from datamodules import CalibrationText
from experiments.memory_study.train import model_settings, of_length
from lightning_modules import MemoryLM
from lightning_modules.cli import TheriaCLI
from lightning_modules.run_directory import CONFIG_NAME

_Kind = TypeVar("_Kind", bound=Callback)

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}
STOPS = (UnhealthyTrainingError, UnhealthyGatesError, torch.OutOfMemoryError)
"""How training ends that is not stable, as opposed to a fault in the code."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of a fit.

    Attributes:
        module: with the weights of the last step, on the device it was trained on.
        data: of the run.
        callbacks: of the trainer.
        directory: of the run.
        precision: makes the context in which training computes.
        seconds: of the fit, set-up and validations included.
    """

    module: MemoryLM
    data: CalibrationText
    callbacks: list[Any]
    directory: Path
    precision: Callable[[], AbstractContextManager[Any]]
    seconds: float

    def callback(self, kind: type[_Kind]) -> _Kind:
        """The trainer's callback of a class.

        Raises:
            ValueError: the configuration has none.
        """
        found = next((callback for callback in self.callbacks if isinstance(callback, kind)), None)
        if found is None:
            raise ValueError(f"the configuration has no {kind.__name__} among trainer.callbacks")
        return found

    def settings(self, kind: type[Callback]) -> dict[str, Any]:
        """What a callback of the run was configured with, defaults included."""
        for entry in merged([self.directory / CONFIG_NAME])["trainer"]["callbacks"]:
            if entry["class_path"].rpartition(".")[2] == kind.__name__:
                return dict(entry["init_args"])
        raise ValueError(f"the configuration has no {kind.__name__} among trainer.callbacks")


def train(
    configs: Sequence[Path], arguments: Sequence[str], *, steps: int, device: str, work: Path, name: str
) -> Trained:
    """Fit through the command line, with every schedule as long as the run.

    Args:
        configs: of `theria fit`, the later ones overlays.
        arguments: further ones.
        steps: to train.
        device: "cpu" or "cuda".
        work: directory of runs.
        name: of this one.

    Raises:
        UnhealthyTrainingError, UnhealthyGatesError, torch.OutOfMemoryError: what ``STOPS`` names.
    """
    given = model_settings(configs, [])
    length = of_length(steps, given, "memory", validations=2)
    files = [part for config in configs for part in ("--config", str(config))]
    where = ["--save_dir", str(work), "--name", name, "--trainer.accelerator", ACCELERATORS[device]]
    started = time.perf_counter()
    try:
        cli = TheriaCLI(args=["fit", *files, *length, *where, *arguments])
    except SystemExit as left:
        # the command line says in one line how training ended, and leaves
        if isinstance(left.__context__, STOPS):
            raise left.__context__ from None
        raise
    seconds = time.perf_counter() - started
    assert cli.run_directory is not None
    assert isinstance(cli.model, MemoryLM)
    # the trainer leaves it on the CPU
    module = cli.model.to(device)
    return Trained(
        module,
        cli.datamodule,
        cli.trainer.callbacks,  # type: ignore[attr-defined]  # set outside of its class body
        cli.run_directory,
        cli.trainer.precision_plugin.forward_context,
        seconds,
    )


def merged(configs: Sequence[Path]) -> dict[str, Any]:
    """Configuration files as one: of a key in several the last, of mappings the union."""
    found: dict[str, Any] = {}
    for config in configs:
        _lay_over(found, yaml.safe_load(config.read_text(encoding="utf-8")))
    return found


def _lay_over(below: dict[str, Any], above: dict[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            _lay_over(below[name], value)
        else:
            below[name] = value
