"""Two processes, with their parameters copied or divided, train as one does, and take up its checkpoints."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from forked_runs import Run, in_forks

from callbacks import read_metrics
from lightning_modules.checkpoint_io import read_checkpoint

STEPS, SAVED = 8, 4
# Of the losses of all steps and of the weights in the end. Sums are taken in another order, and AdamW, which
# divides by a root of squares, makes the most of that where a gradient is nearly zero.
LOSS_TOLERANCE = 2e-5
WEIGHT_TOLERANCE = 2e-4
ENGINES: dict[str, list[str]] = {
    "one": [],
    "ddp": ["--trainer.strategy=ddp", "--trainer.devices=2"],
    "fsdp": ["--config", "configs/trainer/fsdp.yaml"],
}
RESUMED = [("one", "ddp"), ("ddp", "one"), ("one", "fsdp"), ("fsdp", "one"), ("fsdp", "ddp")]
SMALL: dict[str, Any] = {
    "model": {
        "init_args": {
            "width": 16,
            "heads": 2,
            "window": 6,
            "memory_dim": 8,
            "slots": 3,
            "chunk_size": 8,
            "sample_tokens": 4,
            "polarization": {"steps": STEPS, "initial": 1.0, "hold": 0.2},
            "lr_scheduler": {
                "class_path": "WarmupCosine",
                "init_args": {"warmup_steps": 3, "total_steps": STEPS},
            },
        }
    },
    "data": {
        "init_args": {
            "sequence_length": 40,
            "batch_size": 4,
            "train_sequences_per_epoch": 20,
            # of the last batch, the second process has nothing
            "val_sequences": 5,
            "recall": {
                "share": 0.4,
                "min_pairs": 2,
                "max_pairs": 4,
                "queries": 2,
                "query_span": 8,
                "num_val_sequences": 5,
            },
            "num_workers": 0,
        }
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "val_check_interval": SAVED,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "RNGState"},
            {"class_path": "PPLDeltaRollback", "init_args": {"monitor": "lm_loss", "every_n_steps": 2, "healthy_after": 1}},
            {
                "class_path": "NIAHProbe",
                "init_args": {
                    "every_n_steps": 3,
                    "pairs": 4,
                    "capacity": [4],
                    "repetitions": 2,
                    "prompts": 2,
                    "prompt_pairs": 2,
                    "queries": 2,
                    "depths": 2,
                },
            },
            {"class_path": "GateMonitor", "init_args": {"baseline_step": 1, "check_from": 2, "every_n_steps": 2}},
            {"class_path": "MetricsJSONL"},
            {"class_path": "ResumableCheckpoint", "init_args": {"every_n_steps": SAVED, "monitor": "val/bits_per_byte"}},
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
    small = directory / "small.yaml"
    small.write_text(yaml.safe_dump(SMALL))

    def run(name: str, engine: str, *more: str, **options: Any) -> Run:
        configs = ["--config", "configs/memory_lm.yaml", "--config", str(small)]
        arguments = ["fit", *configs, *ENGINES[engine], "--trainer.accelerator=cpu", *more]
        arguments += [f"--save_dir={directory}", f"--name={name}"]
        return Run(name, arguments, 1 if engine == "one" else 2, **options)

    todo = [run(engine, engine) for engine in ENGINES]
    for source, engine in RESUMED:
        checkpoint = directory / source / "version_0" / "checkpoints" / f"step_{SAVED:06d}.ckpt"
        todo.append(run(f"{source}_to_{engine}", engine, f"--ckpt_path={checkpoint}"))
    in_forks(directory, todo)
    return directory


def table(runs: Path, name: str, kind: str = "train") -> pd.DataFrame:
    return read_metrics(runs / name / "version_0" / "metrics.jsonl", kind)


def assert_same_end(runs: Path, name: str) -> None:
    """A run's last checkpoint is that of one process."""
    one, other = (
        read_checkpoint(runs / each / "version_0" / "checkpoints" / f"step_{STEPS:06d}.ckpt")
        for each in ("one", name)
    )
    assert list(other["state_dict"]) == list(one["state_dict"])
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][key], value, rtol=0, atol=WEIGHT_TOLERANCE, msg=key)
    states = [checkpoint["optimizer_states"][0] for checkpoint in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(states[1]["state"][index][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(runs: Path, engine: str) -> None:
    one, two = (table(runs, name) for name in ("one", engine))
    assert one["step"].tolist() == two["step"].tolist() == list(range(1, STEPS + 1))
    for column in ("loss", "lm_loss", "recall_loss", "total_loss", "perplexity", "bits_per_byte"):
        assert two[column].tolist() == pytest.approx(one[column].tolist(), rel=LOSS_TOLERANCE), column
    assert two["grad_norm"].tolist() == pytest.approx(one["grad_norm"].tolist(), rel=1e-4)
    assert two["recall_accuracy"].tolist() == pytest.approx(one["recall_accuracy"].tolist())
    assert_same_end(runs, engine)
