"""A memory language model that is killed and resumed equals the uninterrupted run exactly."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import warm_python
import yaml

from callbacks import read_metrics
from lightning_modules.checkpoint_io import read_checkpoint

HERE = Path(__file__).parent
MAIN_CONFIG = HERE.parents[1] / "configs" / "memory_lm.yaml"
LAST_STEP = 14
KILLS = ["before the optimiser's step", "inside a validation", "at an epoch's end", "three times"]
SMALL: dict[str, Any] = {
    "model": {
        "init_args": {
            "width": 16,
            "heads": 2,
            "window": 6,
            "memory_dim": 8,
            "slots": 4,
            "chunk_size": 8,
            "sample_tokens": 4,
            "polarization": {"steps": LAST_STEP, "initial": 1.0, "hold": 0.2},
            "lr_scheduler": {
                "class_path": "WarmupCosine",
                "init_args": {"warmup_steps": 3, "total_steps": LAST_STEP},
            },
        }
    },
    "data": {
        "init_args": {
            "sequence_length": 40,
            "batch_size": 4,
            "train_sequences_per_epoch": 28,
            "val_sequences": 4,
            "recall": {"min_pairs": 2, "max_pairs": 4, "queries": 2, "query_span": 8, "num_val_sequences": 4},
        }
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": LAST_STEP,
        "val_check_interval": 4,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "RNGState"},
            {"class_path": "MetricsJSONL"},
            {"class_path": "ResumableCheckpoint", "init_args": {"every_n_steps": 3, "keep_last": 2}},
        ],
    },
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all runs, made by one process that forks them."""
    directory = tmp_path_factory.mktemp("runs")
    domains = {}
    for name in ("prose", "sources"):
        (directory / name).mkdir()
        for number in range(40):
            text = "\n\n".join(f"{name} {number} of {line * number}" for line in range(9))
            (directory / name / f"{number}.txt").write_text(text)
        domains[name] = {"built_in": None, "files": [f"{directory}/{name}/*.txt"]}
    SMALL["data"]["init_args"] |= {
        "domains": domains,
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": str(directory / "cache"),
    }
    (directory / "small.yaml").write_text(yaml.safe_dump(SMALL))
    kills = ",".join(["whole", *KILLS])
    configs = [str(MAIN_CONFIG), str(directory / "small.yaml")]
    done = warm_python.run(HERE / "killed_runs.py", [str(directory), kills, *configs])
    assert done.returncode == 0, done.stderr
    return directory


def run_directory(runs: Path, name: str) -> Path:
    return runs / name.replace(" ", "_") / "runs" / "memory_lm" / "version_0"


def log(runs: Path, name: str) -> str:
    return (runs / name.replace(" ", "_") / "log.txt").read_text()


def sequences(runs: Path, name: str) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for line in (runs / name.replace(" ", "_") / "tasks.jsonl").read_text().splitlines():
        step, read = json.loads(line)
        assert found.setdefault(step, read) == read, f"step {step} read other sequences the second time"
    return found


def metrics(runs: Path, name: str, kind: str) -> pd.DataFrame:
    table = read_metrics(run_directory(runs, name) / "metrics.jsonl", kind)
    return table.drop(columns=["attempt", "timestamp", "step_seconds"], errors="ignore")


def csv_rows(runs: Path, name: str) -> list[dict[str, str]]:
    with (run_directory(runs, name) / "metrics.csv").open(newline="") as file:
        return [
            {column: value for column, value in row.items() if value and not column.startswith("perf/")}
            for row in csv.DictReader(file)
        ]


def test_the_uninterrupted_run_is_as_meant(runs: Path) -> None:
    assert json.loads((runs / "whole" / "statuses.json").read_text()) == [0], log(runs, "whole")
    assert sorted(sequences(runs, "whole")) == list(range(1, LAST_STEP + 1))
    assert metrics(runs, "whole", "validation")["step"].tolist() == [4, 8, 12]
    weights = metrics(runs, "whole", "train")["polar_weight"].tolist()
    assert weights[:3] == [1.0] * 3
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] < weights[3]


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_as_the_uninterrupted_one(runs: Path, name: str) -> None:
    statuses = json.loads((runs / name.replace(" ", "_") / "statuses.json").read_text())
    assert statuses == [*[-9] * (len(statuses) - 1), 0], log(runs, name)
    assert len(statuses) > 1
    assert sequences(runs, name) == sequences(runs, "whole")
    for kind in ("train", "validation"):
        pd.testing.assert_frame_equal(
            metrics(runs, name, kind), metrics(runs, "whole", kind), check_exact=True, check_like=True
        )
    assert csv_rows(runs, name) == csv_rows(runs, "whole")
    whole, resumed = (
        read_checkpoint(run_directory(runs, each) / "checkpoints" / f"step_{LAST_STEP:06d}.ckpt")
        for each in ("whole", name)
    )
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    for key, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value), key
    assert int(resumed["state_dict"]["polarization.step"]) == LAST_STEP
    assert resumed["lr_schedulers"] == whole["lr_schedulers"]
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, resumed)]
    for index, state in moments[0].items():
        assert all(torch.equal(moments[1][index][key], value) for key, value in state.items())
