"""The training jobs of the study, from the configurations of `theria fit` and what is changed in them."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule

from datamodules import CalibrationText, SyntheticSeqCls
from datamodules.documents import Domain
from datamodules.recall_sequences import Recall
from datamodules.resumable import ResumableDataModule
from lightning_modules import MemoryLM, MetaSeqClassifier
from lightning_modules.memory_lm import Polarization
from lightning_modules.optimisation import WarmupCosine

CONFIGURATIONS = Path(__file__).parents[2] / "configs"
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        configuration: file of `theria fit`.
        changes: in words, how the job differs from it.
        model, data: arguments that differ from the file's.
        validation_loss: the one that runs are compared by.
    """

    configuration: str
    changes: str
    validation_loss: str
    model: Values = dataclasses.field(default_factory=dict)
    data: Values = dataclasses.field(default_factory=dict)

    def make(self, seed: int) -> tuple[LightningModule, ResumableDataModule]:
        """Module and data; the seed is of the data, that of the weights is the process's."""
        settings = self._settings()
        model = settings["model"]["init_args"] | self.model
        data = settings["data"]["init_args"] | self.data | {"seed": seed}
        if settings["model"]["class_path"] == "MetaSeqClassifier":
            return MetaSeqClassifier(**_built(model)), SyntheticSeqCls(**data)
        data["domains"] = {name: Domain(**domain) for name, domain in data["domains"].items()}
        data["recall"] = data["recall"] and Recall(**data["recall"])
        model["polarization"] = model["polarization"] and Polarization(**model["polarization"])
        return MemoryLM(**_built(model)), CalibrationText(**data)

    @property
    def trainer(self) -> Values:
        """What the configuration sets of the arithmetic, for a Trainer."""
        settings = self._settings()["trainer"]
        names = ("precision", "gradient_clip_val", "inference_mode", "use_distributed_sampler")
        return {name: settings[name] for name in names if name in settings}

    @property
    def monitor(self) -> str:
        """The loss that PPLDeltaRollback judges."""
        callbacks = self._settings()["trainer"]["callbacks"]
        (own,) = (each for each in callbacks if each["class_path"] == "PPLDeltaRollback")
        return str(own["init_args"]["monitor"])

    def _settings(self) -> Values:
        text = (CONFIGURATIONS / self.configuration).read_text(encoding="utf-8")
        settings: Values = yaml.safe_load(text)
        return settings


def _built(model: Mapping[str, Any]) -> Values:
    """Arguments with the optimiser and the scheduler as functions."""
    optimizer, scheduler = model["optimizer"], model["lr_scheduler"]
    kind = getattr(torch.optim, optimizer["class_path"].rpartition(".")[2])
    return {
        **model,
        "optimizer": partial(kind, **optimizer["init_args"]),
        "lr_scheduler": scheduler and partial(WarmupCosine, **scheduler["init_args"]),
    }


_SMALL = {"width": 64, "window": 16, "memory_dim": 32, "sample_tokens": 0}
_SHORT = {"sequence_length": 128, "val_sequences": 128}
_RECALL = {
    "share": 0.5,
    "min_pairs": 4,
    "max_pairs": 16,
    "queries": 4,
    "query_span": 32,
    "num_keys": 32,
    "num_values": 16,
}
_FAST = {"class_path": "AdamW", "init_args": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1}}

JOBS = {
    "meta_seqcls": Job(
        "meta_seqcls.yaml",
        "the frozen configuration of the study, unchanged: FULL, 5 inner steps, 16 tasks, Adam at 1e-3",
        "val/query_loss",
    ),
    "memory_lm": Job(
        "memory_lm.yaml",
        "smaller: width 64, window 16, memory width 32, sequences of 128, 4 to 16 pairs of recall (32 keys, "
        "16 values)",
        "val/bits_per_byte",
        {**_SMALL, "vocab_size": 305},
        {**_SHORT, "recall": _RECALL},
    ),
    "noisy_text": Job(
        "memory_lm.yaml",
        "the same size on text alone, and noisier: 2 sequences a batch, AdamW at 1e-2, no polarisation loss",
        "val/bits_per_byte",
        {**_SMALL, "vocab_size": 257, "polarization": None, "optimizer": _FAST},
        {**_SHORT, "recall": None, "batch_size": 2},
    ),
}
COST_JOBS = {
    "meta_seqcls": JOBS["meta_seqcls"],
    "memory_lm": Job("memory_lm.yaml", "unchanged", "", {"sample_tokens": 0}),
    "memory_lm_60m": Job("memory_lm_60m.yaml", "unchanged", "", {"sample_tokens": 0}),
}
COSTS_ON = {"cpu": ("meta_seqcls", "memory_lm"), "cuda": ("meta_seqcls", "memory_lm_60m")}
