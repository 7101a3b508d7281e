"""Two processes, with their parameters copied or divided, train as one does, and take up its checkpoints."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
import yaml
from forked_runs import ACCELERATORS, Run, in_forks, in_processes

from callbacks import read_metrics
from lightning_modules.checkpoint_io import read_checkpoint

STEPS, SAVED = 8, 4
BROKEN = 4  # number of the batch of step 5


class Tolerance(NamedTuple):
    """Relative ones: of every loss, and of the norms of all weights and of all of the optimiser's moments.

    Sums are taken in another order. On GPUs matrices of other sizes are multiplied by other kernels too.
    """

    loss: float
    weights: float
    moments: float


TOLERANCES = {"cpu": Tolerance(2e-6, 1e-6, 1e-5), "gpu": Tolerance(1e-4, 1e-3, 1e-2)}
ENGINES: dict[str, list[str]] = {
    "one": [],
    "ddp": ["--trainer.strategy=ddp", "--trainer.devices=2"],
    "fsdp": ["--config", "configs/trainer/fsdp.yaml"],
}
LOSSES = ("loss", "lm_loss", "recall_loss", "total_loss")
RESUMED = [("one", "ddp"), ("ddp", "one"), ("one", "fsdp"), ("fsdp", "one")]
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
            {
                "class_path": "PPLDeltaRollback",
                "init_args": {
                    "monitor": "lm_loss",
                    "every_n_steps": 2,
                    "healthy_after": 1,
                    "skip_window": 1,
                },
            },
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
            {
                "class_path": "GateMonitor",
                "init_args": {"baseline_step": 1, "check_from": 2, "every_n_steps": 2},
            },
            {"class_path": "MetricsJSONL"},
            {"class_path": "forked_runs.OwnParts"},
            {
                "class_path": "ResumableCheckpoint",
                "init_args": {"every_n_steps": SAVED, "monitor": "val/bits_per_byte"},
            },
        ],
    },
}

pytestmark = pytest.mark.slow


class Runs(NamedTuple):
    """The directory of all runs, what they said, and what their numbers may differ by."""

    directory: Path
    said: dict[str, str]
    tolerance: Tolerance

    def table(self, name: str, kind: str = "train") -> pd.DataFrame:
        """The metrics of a run."""
        return read_metrics(self.directory / name / "version_0" / "metrics.jsonl", kind)

    def end(self, name: str) -> dict[str, Any]:
        """The last checkpoint of a run."""
        return read_checkpoint(checkpoint(self.directory, name, STEPS))


def checkpoint(directory: Path, name: str, step: int) -> Path:
    return directory / name / "version_0" / "checkpoints" / f"step_{step:06d}.ckpt"


def settings_of(directory: Path) -> Path:
    """The overlay of all runs, on text of a few kilobytes."""
    domains = {}
    for name in ("prose", "sources"):
        (directory / name).mkdir()
        for number in range(40):
            text = "\n\n".join(f"{name} {number} of {line * number}" for line in range(9))
            (directory / name / f"{number}.txt").write_text(text)
        domains[name] = {"built_in": None, "files": [f"{directory}/{name}/*.txt"]}
    more = {
        "domains": domains,
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": str(directory / "cache"),
    }
    small = SMALL | {"data": {"init_args": SMALL["data"]["init_args"] | more}}
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(small))
    return path


@pytest.fixture(scope="module", params=ACCELERATORS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run from the beginning, one that is taken back, and one from every checkpoint."""
    accelerator: str = request.param
    directory = tmp_path_factory.mktemp("runs")
    small = settings_of(directory)

    def run(name: str, engine: str, *more: str, broken: tuple[int, ...] = ()) -> Run:
        configs = ["--config", "configs/memory_lm.yaml", "--config", str(small)]
        arguments = ["fit", *configs, *ENGINES[engine], f"--trainer.accelerator={accelerator}", *more]
        arguments += [f"--save_dir={directory}", f"--name={name}"]
        return Run(name, arguments, 1 if engine == "one" else 2, broken=broken)

    begun = [run(engine, engine) for engine in ENGINES]
    begun += [run(f"{engine}_healed", engine, broken=(BROKEN,)) for engine in ("one", "fsdp")]
    resumed = [
        run(f"{source}_to_{engine}", engine, f"--ckpt_path={checkpoint(directory, source, SAVED)}")
        for source, engine in RESUMED
    ]
    if accelerator == "cpu":
        said = in_forks(directory, begun + resumed)
    else:
        said = in_processes(directory, begun) | in_processes(directory, resumed)
    return Runs(directory, said, TOLERANCES[accelerator])


def assert_same_end(runs: Runs, name: str, other: str = "one") -> None:
    """Two runs end with the same weights and moments, in checkpoints of the same form."""
    ends = [runs.end(each) for each in (name, other)]
    states = [end["optimizer_states"][0] for end in ends]
    assert list(ends[0]["state_dict"]) == list(ends[1]["state_dict"])
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for key in ("exp_avg", "exp_avg_sq"):
        moments = [[value[key] for value in state["state"].values()] for state in states]
        assert_close(*moments, tolerance=runs.tolerance.moments)
    assert_close(*(list(end["state_dict"].values()) for end in ends), tolerance=runs.tolerance.weights)


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], *, tolerance: float) -> None:
    """In shapes and, together, in norm."""
    assert [part.shape for part in found] == [part.shape for part in expected]
    a, b = (torch.cat([part.double().flatten() for part in parts]) for parts in (found, expected))
    assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(runs: Runs, engine: str) -> None:
    """Ranks have different numbers of labels, of text and of recall."""
    one, two = (runs.table(name) for name in ("one", engine))
    assert one["step"].tolist() == two["step"].tolist() == list(range(1, STEPS + 1))
    for column in (*LOSSES, "grad_norm", "polar_loss"):
        assert two[column].tolist() == pytest.approx(one[column].tolist(), rel=runs.tolerance.loss), column
    # of losses of six, a millionth of which is six millionths of their exponential
    for column in ("perplexity", "bits_per_byte"):
        assert two[column].tolist() == pytest.approx(one[column].tolist(), rel=10 * runs.tolerance.loss)
    assert two["recall_accuracy"].tolist() == pytest.approx(one["recall_accuracy"].tolist())
    assert_same_end(runs, engine)


@pytest.mark.parametrize(("source", "engine"), RESUMED)
def test_a_checkpoint_goes_on_with_another_number_of_processes(runs: Runs, source: str, engine: str) -> None:
    one, resumed = (runs.table(name) for name in ("one", f"{source}_to_{engine}"))
    assert resumed["step"].tolist() == list(range(SAVED + 1, STEPS + 1))
    for column in LOSSES:
        expected = pytest.approx(one[column].tolist()[SAVED:], rel=runs.tolerance.loss)
        assert resumed[column].tolist() == expected, column
    assert_same_end(runs, f"{source}_to_{engine}")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_validation_and_probes_are_those_of_one_process(runs: Runs, engine: str) -> None:
    """Of each validation set the second process has a batch less; samples and probes are the first's."""
    one, two = (runs.table(name, "validation") for name in ("one", engine))
    figures = [name for name in one if name.startswith("val/")]
    assert one["step"].tolist() == two["step"].tolist() == [SAVED, STEPS]
    assert {"val/bits_per_byte", "val/sources_perplexity", "val/recall_accuracy_memory_off"} <= set(figures)
    for name in figures:
        assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=10 * runs.tolerance.loss), name
    probed = [runs.table(name)["niah_cosine"].dropna() for name in ("one", engine)]
    assert probed[0].index.tolist() == probed[1].index.tolist() == [2, 5]
    assert probed[1].tolist() == pytest.approx(probed[0].tolist(), rel=10 * runs.tolerance.loss)


def test_one_broken_part_of_the_gradients_takes_all_processes_back(runs: Runs) -> None:
    """It is in the second process's part alone; the parts of the first are whole and finite."""
    one, two = (runs.table(f"{name}_healed") for name in ("one", "fsdp"))
    for table in (one, two):
        assert table["attempt"].tolist() == [1] * 2 + [2] * 6
        assert table["rollback_count"].tolist() == [0.0] * 2 + [1.0] * 6
    for column in LOSSES:
        assert two[column].tolist() == pytest.approx(one[column].tolist(), rel=runs.tolerance.loss), column
    assert "the gradient of step 5 is nan" in runs.said["fsdp_healed"]
    assert_same_end(runs, "fsdp_healed", "one_healed")


def test_each_process_holds_half(runs: Runs) -> None:
    """Right behind a probe, for which parameters are whole, and in the end."""
    for engine, least, most in (("ddp", 1.0, 1.0), ("fsdp", 0.45, 0.55)):
        held = re.findall(r"rank \d holds (\d+) of (\d+) (\w+)", runs.said[engine])
        assert [what for *_, what in held].count("parameters") == 4
        assert [what for *_, what in held].count("moments") == 4
        for own, whole, _ in held:
            assert least <= int(own) / int(whole) <= most
