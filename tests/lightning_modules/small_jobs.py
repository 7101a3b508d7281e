"""Both jobs at a size of which a test runs many, from the command line."""

import csv
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.checkpoint_io import read_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = {"meta": CONFIGS / "meta_seqcls.yaml", "text": CONFIGS / "memory_lm.yaml"}
NAME = {"meta": "meta_seqcls", "text": "memory_lm"}
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "max_steps": 4,
    "val_check_interval": 2,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "callbacks": [
        {"class_path": "RNGState"},
        {
            "class_path": "PPLDeltaRollback",
            "init_args": {"every_n_steps": 2, "healthy_after": 1, "skip_window": 0, "cool_down": 0},
        },
        {"class_path": "MetricsJSONL"},
        {"class_path": "ResumableCheckpoint", "init_args": {"every_n_steps": 1, "keep_last": 20}},
    ],
}
META: dict[str, Any] = {
    "model": {"init_args": {"width": 6, "num_classes": 2, "inner_steps": 1}},
    "data": {
        "init_args": {
            "length": 5,
            "width": 6,
            "num_classes": 2,
            "num_signal_positions": 2,
            "support_size": 3,
            "query_size": 3,
            "meta_batch_size": 2,
            "train_tasks_per_epoch": 14,
            "val_tasks": 12,
        }
    },
    "trainer": TRAINER,
}
TEXT: dict[str, Any] = {
    "model": {
        "init_args": {
            "width": 16,
            "heads": 2,
            "window": 6,
            "memory_dim": 8,
            "slots": 4,
            "chunk_size": 8,
            "sample_tokens": 0,
            "lr_scheduler": {
                "class_path": "WarmupCosine",
                "init_args": {"warmup_steps": 3, "total_steps": 20},
            },
        }
    },
    "data": {
        "init_args": {
            "sequence_length": 40,
            "batch_size": 4,
            "train_sequences_per_epoch": 28,
            "val_sequences": 8,
            "recall": {"min_pairs": 2, "max_pairs": 4, "queries": 2, "query_span": 8, "num_val_sequences": 8},
            "val_fraction": 0.2,
            "test_fraction": 0.2,
        }
    },
    "trainer": TRAINER,
}


def write_jobs(directory: Path) -> None:
    """Write meta.yaml and text.yaml, and the text."""
    domains = {}
    for name in ("prose", "sources"):
        (directory / name).mkdir()
        for number in range(40):
            text = "\n\n".join(f"{name} {number} of {line * number}" for line in range(9))
            (directory / name / f"{number}.txt").write_text(text)
        domains[name] = {"built_in": None, "files": [f"{directory}/{name}/*.txt"]}
    own = {"domains": domains, "cache_dir": str(directory / "cache")}
    text_job = TEXT | {"data": {"init_args": TEXT["data"]["init_args"] | own}}
    (directory / "meta.yaml").write_text(yaml.safe_dump(META))
    (directory / "text.yaml").write_text(yaml.safe_dump(text_job))


def fit_arguments(jobs: Path, job: str, *more: str | Path) -> list[str]:
    """Of a fit of a small job; a path among `more` is an overlay, by its name in configs/trainer."""
    files = [BASE[job], jobs / f"{job}.yaml"]
    arguments = ["fit", *(part for file in files for part in ("--config", str(file)))]
    for each in more:
        overlay = ["--config", str(CONFIGS / "trainer" / f"{each}.yaml")]
        arguments += [str(each)] if str(each).startswith("--") else overlay
    return arguments


def run_directory(job: str, version: int = 0) -> Path:
    return Path("runs", NAME[job], f"version_{version}")


def checkpoint(job: str, step: int, version: int = 0) -> dict[str, Any]:
    return read_checkpoint(run_directory(job, version) / "checkpoints" / f"step_{step:06d}.ckpt")


def steps_saved(job: str, version: int = 0) -> list[int]:
    files = (run_directory(job, version) / "checkpoints").glob("step_*.ckpt")
    return sorted(int(path.stem.removeprefix("step_")) for path in files)


def column(job: str, name: str, version: int = 0) -> list[float]:
    """A column of metrics.csv, where it has an entry."""
    with (run_directory(job, version) / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
