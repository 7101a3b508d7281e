"""One run of the study under Lightning's Trainer, and the file of figures that it leaves."""

import dataclasses
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from callbacks import MetricsJSONL, PPLDeltaRollback, RNGState, UnhealthyTrainingError, read_metrics
from callbacks.step_loss import StepLoss
from experiments.self_healing.faults import FAULTS, Injection
from experiments.self_healing.jobs import JOBS, Job
from lightning_modules.atomic_file import atomic_file
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.host_memory import keep_freed_memory

HEALTHY = "healthy"
CHECKPOINTS_EVERY = 200
"""Steps between two checkpoints of a run with a fault, that its replay is short."""

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, and what is done to it.

    Attributes:
        job: name in ``JOBS``.
        fault: name in ``FAULTS``, or healthy.
        seed: of the weights and the data.
        steps: to train.
        device: "cpu" or "cuda".
    """

    job: str
    fault: str
    seed: int
    steps: int
    device: str

    @property
    def file_name(self) -> str:
        """Of its figures."""
        return "-".join(str(value) for value in dataclasses.astuple(self)) + ".json"


def prepare_process() -> None:
    """What a process needs once."""
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        "training goes back from step",
        "GPU available but not used",
    ):
        warnings.filterwarnings("ignore", message=message)


def perform(run: Run, work: Path) -> None:
    """Do a run and write its figures; a run that has them already is not done again."""
    path = work / run.file_name
    if path.exists():
        return
    figures = train(run)
    with atomic_file(path) as file:
        file.write(json.dumps(figures).encode())


def load(run: Run, work: Path) -> Figures:
    """The figures of a run that was done."""
    found: Figures = json.loads((work / run.file_name).read_text())
    return found


def train(run: Run) -> Figures:
    """Train and validate; what was judged, taken back, and come to, in plain values."""
    job = JOBS[run.job]
    seed_everything(run.seed, verbose=False)
    module, data = job.make(run.seed)
    healer = PPLDeltaRollback(job.monitor)
    if run.fault != HEALTHY:
        healer = PPLDeltaRollback(job.monitor, every_n_steps=CHECKPOINTS_EVERY)
    losses = Losses(job.monitor)
    fault = [] if run.fault == HEALTHY else [Injection(FAULTS[run.fault])]
    started = time.perf_counter()
    stopped = None
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(
            job, run.device, run.steps, directory, [RNGState(), *fault, healer, MetricsJSONL(), losses]
        )
        try:
            trainer.fit(module, datamodule=data)
        except UnhealthyTrainingError as error:
            stopped = str(error).replace(directory, "RUN")
        seconds = time.perf_counter() - started
        steps = read_metrics(Path(directory) / "metrics.jsonl")["step"].tolist()
        validated = [] if stopped else trainer.validate(module, datamodule=data, verbose=False)
    return {
        **dataclasses.asdict(run),
        "losses": losses.seen,
        "hit": fault[0].hit if fault else [],
        "rollbacks": [
            {"first_bad": r.fault.first_step, "at": r.step, "to": r.target, "reason": r.fault.reason}
            for r in healer.history
        ],
        "stopped": stopped,
        "recorded_once": steps == list(range(1, len(steps) + 1)),
        "validation": {name: float(value) for result in validated for name, value in result.items()},
        "seconds": seconds,
    }


def trainer_of(job: Job, device: str, steps: int, directory: str, callbacks: list[Callback]) -> Trainer:
    """A Trainer as the job's configuration has it, which writes into a directory and validates nothing."""
    return Trainer(
        accelerator=device,
        devices=1,
        max_steps=steps,
        default_root_dir=directory,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        val_check_interval=10**9,
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **job.trainer,
    )


class Losses(Callback):
    """What PPLDeltaRollback judges: (step, loss) of every step in the order of training.

    Args:
        monitor: name of the loss.
    """

    def __init__(self, monitor: str) -> None:
        self._loss = StepLoss(monitor)
        self._seen: list[tuple[int, torch.Tensor]] = []

    @property
    def seen(self) -> list[tuple[int, float]]:
        """Read from the device in one transfer."""
        values = torch.stack([loss for _, loss in self._seen]).tolist()
        return [(step, value) for (step, _), value in zip(self._seen, values, strict=True)]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A new batch."""
        self._loss.begin_batch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep its loss."""
        self._loss.add_batch(trainer, pl_module, outputs)
        self._seen.append((trainer.global_step, self._loss.take_step()))
