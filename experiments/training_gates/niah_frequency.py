"""How often the needle probe may run: its cost beside that of a training step, measured in `theria fit`."""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.report import markdown_table, provenance
from lightning_modules.cli import TheriaCLI
from theria.memory.needle import Mean

CANDIDATES = (100, 200, 500, 1000, 2000, 5000, 10_000)
LIMIT = 0.01
AIM = 0.002
CONFIGS = {"cpu": Path("configs/memory_lm.yaml"), "cuda": Path("configs/memory_lm_60m.yaml")}

_LEFT_OUT = ("StepProgressBar", "ResumableCheckpoint")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What probes cost beside the steps around them.

    Attributes:
        steps: a probe in training steps, with its logging, its figures and what it slows the step after it
            down.
        probe, step: both in seconds.
        first: seconds of a run's first probe, which is in none of these.
    """

    steps: Mean
    probe: Mean
    step: Mean
    first: float

    def overhead(self, every_n_steps: int) -> tuple[float, float]:
        """Time of probes over that of training, one every so many steps, and its interval's upper end."""
        return self.steps.value / every_n_steps, self.steps.high / every_n_steps


class StepClock(Callback):
    """When each step ended, its callbacks included: stands behind them.

    Attributes:
        ended: seconds, of every finished step.
    """

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the device and read the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.ended.append(time.perf_counter())


def add_command(commands: Any) -> None:
    """Add niah-frequency to the command line."""
    parser = commands.add_parser("niah-frequency", help="measure the needle probe's cost and decide")
    parser.add_argument("--device", choices=tuple(CONFIGS), default="cpu")
    parser.add_argument("--config", type=Path, help="of the run; memory_lm.yaml, on CUDA memory_lm_60m.yaml")
    parser.add_argument("--probes", type=int, default=30, help="probes measured, after the first")
    parser.add_argument("--between", type=int, default=6, help="steps from probe to probe, at least 4")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/niah_frequency.md"), help="page to write"
    )


def measure(device: str, config: Path, *, probes: int, between: int) -> Cost:
    """Train as configured, with a probe every few steps, and compare the steps they touch with the others.

    Of the configuration only what is not a step of training is left out: validation, checkpoints, the
    progress bar, and the logging of steps.

    Args:
        device: "cpu" or "cuda".
        config: of ``theria fit``, with a NIAHProbe.
        probes: to measure, behind the first.
        between: steps from one to the next, at least 4.

    Raises:
        ValueError: for fewer than 3 probes or 4 steps between them, or a configuration without the probe.
    """
    if probes < 3 or between < 4:
        raise ValueError(
            f"expected at least 3 probes and 4 steps between them, received {probes} and {between}"
        )
    steps = between * (probes + 2) - 1
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        # what an untrained model fails at is not the subject
        warnings.filterwarnings("ignore", message="NIAHProbe: at step")
        changed = Path(directory) / "config.yaml"
        changed.write_text(yaml.safe_dump(_settings(config, device, steps, between)), encoding="utf-8")
        cli = TheriaCLI(args=["fit", "--config", str(changed), "--save_dir", directory])
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]  # set outside of its body
    (clock,) = (callback for callback in callbacks if isinstance(callback, StepClock))
    return cost_of(clock.ended, between)


def cost_of(ended: Sequence[float], between: int) -> Cost:
    """The costs in a run in which every ``between``-th step had a probe behind it.

    The interval that ends behind a probe and the one after it are compared with the median of those up to
    the next probe, so that a machine whose speed drifts counts for neither.

    Args:
        ended: times at which steps 1, 2, ... with all that followed them had ended.
        between: steps from one probe to the next, at least 4.
    """
    took = [after - before for before, after in itertools.pairwise(ended)]  # that of step 2 stands first
    windows = [took[at - 2 : at - 2 + between] for at in range(between, len(ended) - between + 2, between)]
    step = torch.tensor([statistics.median(window[2:]) for window in windows], dtype=torch.float64)
    probe = torch.tensor([sum(window[:2]) for window in windows], dtype=torch.float64) - 2 * step
    return Cost(Mean.of(probe[1:] / step[1:]), Mean.of(probe[1:]), Mean.of(step[1:]), float(probe[0]))


def locked(cost: Cost) -> int:
    """The shortest interval whose overhead is surely within the aim, or else within the limit.

    Raises:
        ValueError: even the longest candidate may cost more than the limit.
    """
    for most in (AIM, LIMIT):
        for every_n_steps in CANDIDATES:
            if cost.overhead(every_n_steps)[1] <= most:
                return every_n_steps
    raise ValueError(f"even every {CANDIDATES[-1]} steps a probe may cost more than {LIMIT:.0%} of training")


def report(args: argparse.Namespace) -> str:
    """The page: what a probe and a step take, the overhead of every candidate, and the decision."""
    config = args.config or CONFIGS[args.device]
    cost = measure(args.device, config, probes=args.probes, between=args.between)
    rows = []
    for every_n_steps in CANDIDATES:
        share, most = cost.overhead(every_n_steps)
        rows.append([f"{every_n_steps:,}", f"{share:.3%}", f"{most:.3%}"])
    lines = ["# Frequency of the needle probe", "", provenance("experiments.training_gates")]
    lines += [
        f"`theria fit` with `{config}` on {args.device}, a probe every {args.between} steps, {args.probes} "
        "probes after the first. A probe counts with its logging, its figures and what it slows the step "
        "behind it down; a step is one that no probe touches, the median between two probes.",
        "",
        f"- probe: {_milliseconds(cost.probe)} (the first of a run: {1e3 * cost.first:.0f} ms)",
        f"- step: {_milliseconds(cost.step)}",
        f"- a probe in steps: {cost.steps.value:.2f} [{cost.steps.low:.2f}, {cost.steps.high:.2f}]",
        "",
        *markdown_table(["steps from probe to probe", "overhead", "upper end"], rows),
        "",
        f"Intervals are of 95%, over probes, each in the time of the steps behind it. Limit {LIMIT:.0%}, aim "
        f"{AIM:.1%}, both of the upper end. Locked: **every {locked(cost)} steps**.",
        "",
    ]
    return "\n".join(lines)


def _settings(config: Path, device: str, steps: int, between: int) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(config.read_text())
    trainer = settings["trainer"]
    kept = [entry for entry in trainer["callbacks"] if entry["class_path"] not in _LEFT_OUT]
    probes = [entry for entry in kept if entry["class_path"] == "NIAHProbe"]
    if len(probes) != 1:
        raise ValueError(f"expected a configuration with one NIAHProbe, {config} has {len(probes)}")
    probes[0]["init_args"]["every_n_steps"] = between
    trainer |= {
        "callbacks": [*kept, {"class_path": f"{__name__}.{StepClock.__name__}"}],
        "max_steps": steps,
        "limit_val_batches": 0,
        "log_every_n_steps": steps + 1,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "accelerator": "gpu" if device == "cuda" else "cpu",
    }
    return settings


def _milliseconds(mean: Mean) -> str:
    return f"{1e3 * mean.value:.0f} ms [{1e3 * mean.low:.0f}, {1e3 * mean.high:.0f}]"
