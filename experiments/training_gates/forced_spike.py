"""G2-6: weights that are ruined just before a checkpoint, and what a real short run does about them."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks import read_metrics
from callbacks.metrics_file import decode_record
from experiments.training_gates.gate import Gate
from experiments.training_gates.trained import merged, train

EVERY = 15
SPIKE_AT = 4 * EVERY
STEPS = 6 * EVERY
SHORT_RUN = {
    "PPLDeltaRollback": {
        "baseline_steps": 2 * EVERY,
        "warm_up": 2 * EVERY,
        "every_n_steps": EVERY,
        "healthy_after": EVERY // 2,
        "cool_down": EVERY,
    },
    "ResumableCheckpoint": {"every_n_steps": 2 * EVERY},
}
"""What the configuration's callbacks are told for a run of so few steps; all else is as configured."""

MOST_ABOVE = 0.05
"""Of the loss at the end over that before the spike."""

_STRENGTH = 10.0


class Visit(NamedTuple):
    """Training between two steps.

    Attributes:
        step: steps behind it.
        weights, optimizer: digests of the module's and the optimisers' tensors.
        files: names of the checkpoints there are.
        saved: digest of the weights in this step's rollback checkpoint; None where it was not read.
    """

    step: int
    weights: str
    optimizer: str
    files: frozenset[str]
    saved: str | None = None


class ForcedSpike(Callback):
    """Adds noise to all weights behind one step, once, and looks at every n-th step before it is trained.

    Args:
        step: behind which the noise comes, in time for the checkpoint of that step.
        every_n_steps: between two looks.
        strength: of the noise, in root mean squares of each tensor.

    Attributes:
        visits: what was seen.
    """

    def __init__(self, step: int = SPIKE_AT, every_n_steps: int = EVERY, strength: float = _STRENGTH) -> None:
        self.step = step
        self.every_n_steps = every_n_steps
        self.strength = strength
        self.visits: list[Visit] = []
        self._done = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at what the last step, or a rollback, has left."""
        step = trainer.global_step
        if step % self.every_n_steps:
            return
        directory = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        file = directory / _file(step)
        again = step in {visit.step for visit in self.visits}
        saved = None
        if again and file.exists():
            saved = digest(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
        self.visits.append(
            Visit(
                step,
                digest(pl_module.state_dict()),
                digest([optimizer.state_dict()["state"] for optimizer in trainer.optimizers]),
                frozenset(path.name for path in directory.iterdir()),
                saved,
            )
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ruin the weights."""
        if trainer.global_step != self.step or self._done:
            return
        self._done = True
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in pl_module.parameters():
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(self.strength * weight.square().mean().sqrt() * noise)


class SpikeRun(NamedTuple):
    """What is left of a run with a forced spike.

    Attributes:
        visits: of ``ForcedSpike``.
        spike_at: step behind which the weights were ruined.
        steps: of the run.
        table: of ``callbacks.read_metrics``.
        undone: the first attempt's records, those that a rollback took back included.
    """

    visits: Sequence[Visit]
    spike_at: int
    steps: int
    table: pd.DataFrame
    undone: pd.DataFrame


def run_with_spike(configs: Sequence[Path], *, device: str, work: Path) -> SpikeRun:
    """Train a short run of a configuration, with all of its callbacks, and ruin it once."""
    entries = merged(configs)["trainer"]["callbacks"]
    for entry in entries:
        settings = SHORT_RUN.get(entry["class_path"].rpartition(".")[2], {})
        entry["init_args"] = entry.get("init_args", {}) | settings
    spike = f"{ForcedSpike.__module__}.{ForcedSpike.__qualname__}"
    entries.append({"class_path": spike, "init_args": {"step": SPIKE_AT, "every_n_steps": EVERY}})
    overlay = work / "forced_spike.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": entries}}), encoding="utf-8")
    arguments = ["--trainer.limit_val_batches", "0"]
    run = train([*configs, overlay], arguments, steps=STEPS, device=device, work=work, name="forced_spike")
    (callback,) = (callback for callback in run.callbacks if isinstance(callback, ForcedSpike))
    path = run.directory / "metrics.jsonl"
    return SpikeRun(callback.visits, SPIKE_AT, STEPS, read_metrics(path), first_attempt(path))


def first_attempt(path: Path) -> pd.DataFrame:
    """Every record of a step that the first attempt of a metrics file holds."""
    records = (decode_record(line) for line in path.read_bytes().splitlines())
    return pd.DataFrame(
        [record for record in records if record and record["kind"] == "train" and record["attempt"] == 1]
    )


def spike_gate(run: SpikeRun) -> Gate:
    """Whether training went back to what it was before the spike, dropped what came since, and recovered."""
    bar = (
        "weights and optimiser as they were at an earlier checkpoint bit for bit, no later checkpoint left, "
        f"one rollback, every step once and finite, the loss at the end at most {MOST_ABOVE:.0%} above that "
        "before the spike"
    )
    numbers = [number for number, visit in enumerate(run.visits) if visit.step == run.spike_at]
    if not numbers or _file(run.spike_at) not in run.visits[numbers[0]].files:
        return Gate("G2-6", f"no checkpoint of the ruined step {run.spike_at}", bar, False)
    before, after = run.visits[: numbers[0] + 1], run.visits[numbers[0] + 1 :]
    back = next((visit for visit in after if visit.step <= run.spike_at), None)
    deltas = run.undone.loc[run.undone["step"] > run.spike_at, "ppl_delta"]
    rise = float(deltas.fillna(math.inf).max())  # of a loss that is not a number there is none
    if back is None:
        return Gate("G2-6", f"ppl_delta rose to {rise:+.3g}, and nothing was taken back", bar, False)
    then = next(visit for visit in before if visit.step == back.step)
    same_weights = then.weights == back.weights == back.saved
    same_optimizer = then.optimizer == back.optimizer
    left = sorted(name for name in back.files if _step_of(name) > back.step)
    rollbacks = int(run.table["rollback_count"].max())
    near = run.undone["step"].between(run.spike_at - EVERY + 1, run.spike_at)
    usual, end = float(run.undone.loc[near, "loss"].mean()), float(run.table["loss"].iloc[-EVERY:].mean())
    finite = all(map(math.isfinite, run.table["total_loss"]))
    once = run.table["step"].tolist() == list(range(1, run.steps + 1))
    return Gate(
        "G2-6",
        f"weights ruined behind step {run.spike_at}, ppl_delta {rise:+.3g}, from step "
        f"{int(run.undone['step'].max())} back to {back.step}: weights {_same(same_weights)}, optimiser "
        f"{_same(same_optimizer)}, {len(left)} later checkpoints left; {rollbacks} rollback, loss "
        f"{usual:.3f} before and {end:.3f} at the end",
        bar,
        rise > 0
        and back.step < run.spike_at
        and same_weights
        and same_optimizer
        and not left
        and rollbacks == 1
        and finite
        and once
        and end <= (1 + MOST_ABOVE) * usual,
    )


def digest(tensors: Any) -> str:
    """SHA-256 of all tensors in nested dictionaries and lists, with their keys."""
    found = hashlib.sha256()
    pending: list[tuple[str, Any]] = [("", tensors)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", part) for key, part in sorted(value.items(), key=str)]
        elif isinstance(value, list):
            pending += [(f"{name}.{number}", part) for number, part in enumerate(value)]
        elif isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{name} {value}".encode())
    return found.hexdigest()


def _file(step: int) -> str:
    return f"rollback_{step:06d}.ckpt"


def _step_of(name: str) -> int:
    return int(name.removesuffix(".ckpt").rpartition("_")[2])


def _same(equal: bool) -> str:
    return "equal" if equal else "different"
