"""Fitting a variant of a configuration within a time budget, and all figures of the result."""

import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.report import provenance
from callbacks import read_metrics
from datamodules import CalibrationText
from lightning_modules import MemoryLM
from lightning_modules.cli import TheriaCLI
from theria.memory import MemoryBranch
from theria.models.memory_lm import MemoryLM as Decoder

VARIANTS = ("memory", "attention", "no_polarization")

_WARM_UP_STEPS = 20
_TIMED_STEPS = 20
# callbacks that refuse a model without a memory
_OF_MEMORY = ("NIAHProbe",)
_ARCHITECTURE = ("width", "blocks", "heads", "window", "memory_heads", "memory_dim", "rule", "slots", "taps")

Figures = dict[str, Any]


def train(
    configs: Sequence[Path],
    variant: str,
    *,
    overrides: list[str],
    steps: int | None,
    minutes: float | None,
    work: Path,
) -> tuple[Figures, CalibrationText]:
    """Train a variant and return its figures, in plain values, and the data it was trained on.

    Args:
        configs: of `theria fit`, the later ones overlays.
        variant: "memory" as configured, "attention" alone with as many parameters, or "no_polarization".
        overrides: further arguments of `theria fit`.
        steps: to train, with all schedules as long; None takes the configuration's.
        minutes: where given, and steps are not, as many steps as fit into them.
        work: directory of the run.
    """
    given = model_settings(configs, overrides)
    if variant == "attention":
        configs = [_without_memory_callbacks(config, work) for config in configs]
    arguments = ["fit", *(part for config in configs for part in ("--config", str(config))), *overrides]
    arguments += _of_variant(given, variant)
    if steps is None and minutes is not None:
        steps = max(1, int(60 * minutes / _seconds_a_step(arguments)))
    if steps is not None:
        arguments += of_length(steps, given, variant)
    started = time.perf_counter()
    cli = TheriaCLI(args=[*arguments, "--save_dir", str(work), "--name", variant])
    fitted = time.perf_counter() - started
    figures = {
        "variant": variant,
        "provenance": provenance("experiments.memory_study"),
        "steps": cli.trainer.global_step,
        "seconds": fitted,
        "parameters": sum(p.numel() for p in cli.model.parameters()),
        "history": _history(cli),
        **_speed(cli),
        **_evaluate(cli),
        **_texts(cli),
    }
    return figures, cli.datamodule


def matching_hidden(given: dict[str, Any]) -> int:
    """Hidden width of the MLPs with which attention alone has the parameters of the configured model."""
    with torch.device("meta"):
        whole = _size(Decoder(given["vocab_size"], **_sizes(given)))
        alone = {**_sizes(given), "memory_heads": 0, "mlp_hidden": 8}
        rest = _size(Decoder(given["vocab_size"], **alone))
    # a multiple of 8, which tensor cores want
    eight_units = 8 * 3 * given["width"] * given["blocks"]
    return 8 + 8 * round((whole - rest) / eight_units)


def _without_memory_callbacks(config: Path, folder: Path) -> Path:
    """A copy of a configuration that leaves out what only a memory has use for."""
    settings = yaml.safe_load(config.read_text())
    trainer = settings.get("trainer", {})
    for key in ("callbacks", "callbacks+"):
        if key in trainer:
            trainer[key] = [entry for entry in trainer[key] if entry["class_path"] not in _OF_MEMORY]
    copy = folder / f"attention_{config.name}"
    copy.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return copy


def _of_variant(given: dict[str, Any], variant: str) -> list[str]:
    if variant == "attention":
        return _model(memory_heads=0, mlp_hidden=matching_hidden(given), polarization="null")
    return _model(polarization="null") if variant == "no_polarization" else []


def model_settings(configs: Sequence[Path], overrides: list[str]) -> dict[str, Any]:
    """The model's settings in the files and in arguments of the form --model.init_args.NAME VALUE."""
    settings: dict[str, Any] = {}
    for config in configs:
        settings |= yaml.safe_load(config.read_text()).get("model", {}).get("init_args", {})
    prefix = "--model.init_args."
    for name, value in itertools.pairwise(overrides):
        if name.startswith(prefix):
            settings[name.removeprefix(prefix)] = yaml.safe_load(value)
    return settings


def of_length(steps: int, given: dict[str, Any], variant: str, *, validations: int = 10) -> list[str]:
    """Arguments that train so many steps, validate so often, and end every schedule with them."""
    every = str(max(1, steps // validations))
    arguments = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", every]
    scheduler = given.get("lr_scheduler") or {}
    if "total_steps" in scheduler.get("init_args", {}):
        warm_up = min(scheduler["init_args"]["warmup_steps"], steps // 4)
        arguments += _model(
            **{
                "lr_scheduler.init_args.total_steps": steps,
                "lr_scheduler.init_args.warmup_steps": warm_up,
            }
        )
    if given.get("polarization") and variant == "memory":
        arguments += _model(**{"polarization.steps": steps})
    return arguments


def _model(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in (f"--model.init_args.{name}", str(value))]


def _seconds_a_step(arguments: list[str]) -> float:
    """Seconds of a training step once it is warm, by the clock of a short run."""
    with tempfile.TemporaryDirectory() as directory:
        short = {
            "save_dir": directory,
            "trainer.max_steps": _WARM_UP_STEPS + _TIMED_STEPS,
            "trainer.limit_val_batches": 0,
            "trainer.log_every_n_steps": _TIMED_STEPS,
            "model.init_args.sample_tokens": 0,
        }
        cli = TheriaCLI(args=[*arguments, *(f"--{name}={value}" for name, value in short.items())])
        return _last_logged(cli, "perf/step_seconds")


def _last_logged(cli: TheriaCLI, name: str) -> float:
    """The last value of a tag in the run's metrics.csv."""
    assert cli.run_directory is not None
    lines = (cli.run_directory / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index(name)
    return next(float(cells[column]) for cells in (line.split(",") for line in lines[:0:-1]) if cells[column])


def _speed(cli: TheriaCLI) -> Figures:
    return {"tokens_per_second": _last_logged(cli, "perf/tokens_per_second")}


def _history(cli: TheriaCLI) -> list[Figures]:
    """Every validation of the run, with the gates' statistics of its step."""
    assert cli.run_directory is not None
    path = cli.run_directory / "metrics.jsonl"
    steps = read_metrics(path).set_index("step")
    history = []
    for row in json.loads(read_metrics(path, "validation").to_json(orient="records")):
        gates = steps.loc[row["step"]]
        kept = {
            name: gates[name] for name in ("gate_mean", "polarized_ratio", "polar_weight") if name in gates
        }
        history.append({name: value for name, value in row.items() if "/" in name or name == "step"} | kept)
    return history


def _evaluate(cli: TheriaCLI) -> Figures:
    """All of the test split, and what the memories have learned of the projection."""
    (test, *_) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    model = cli.model
    assert isinstance(model, MemoryLM)
    shares = [part.share.tolist() for part in model.modules() if isinstance(part, MemoryBranch)]
    return {"figures": test, "shares": shares, "reach": model.reach}


def _texts(cli: TheriaCLI) -> Figures:
    """What was read, and how much of training was text."""
    data = cli.datamodule
    return {
        "corpus": data.summary(),
        "recall": None if data.recall is None else dict(data.hparams["recall"]),
        "tokens_per_step": data.batch_size * data.sequence_length,
    }


def _sizes(given: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: given[name] for name in _ARCHITECTURE}
    return {**sizes, "mlp_hidden": given.get("mlp_hidden")}


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
