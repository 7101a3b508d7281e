"""Rollbacks of the meta-learning job, as configured: from the command line, alone and with two processes."""

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from forked_runs import Run, in_forks

from callbacks import read_metrics

STEPS = 20
SMALL = {
    "model.init_args.width": 6,
    "data.init_args.width": 6,
    "data.init_args.length": 5,
    "data.init_args.meta_batch_size": 2,
    "data.init_args.train_tasks_per_epoch": 10,
    "data.init_args.val_tasks": 6,
    "model.init_args.inner_steps": 1,
    "model.init_args.optimizer": "torch.optim.SGD",
    "model.init_args.optimizer.init_args.lr": 0.1,
    "trainer.accelerator": "cpu",
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": STEPS,
    # rows are averaged over processes as they are handed over: until then a loss is the process's own
    "trainer.log_every_n_steps": STEPS,
}


TWO = {"trainer.strategy": "ddp", "trainer.devices": 2}
HEALER = {
    "every_n_steps": 1,
    "healthy_after": 1,
    "warm_up": 1,
    "baseline_steps": 5,
    "threshold": 0.5,
    "trigger": "plain",
    "skip_window": 1,
    "cool_down": 2,
}

pytestmark = pytest.mark.slow


class Ended(NamedTuple):
    """A run's directory, its last weights, and what it said."""

    path: Path
    weights: dict[str, torch.Tensor]
    said: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """A bad task and a spike, each in a run of one process and of two."""
    directory = tmp_path_factory.mktemp("runs")
    overlay = directory / "overlay.yaml"
    names = ["RNGState", "PPLDeltaRollback", "MetricsJSONL", "ResumableCheckpoint"]
    callbacks = [{"class_path": name} | ({"init_args": HEALER} if "PPL" in name else {}) for name in names]
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    runs = []
    for name, configs, spoiled in (
        ("task", ["configs/meta_seqcls.yaml"], (math.nan, [5])),
        ("spike", ["configs/meta_seqcls.yaml", str(overlay)], (50.0, [5, 7])),
    ):
        files = [part for config in configs for part in ("--config", config)]
        for processes, more in ((1, {}), (2, TWO)):
            given = SMALL | more | {"save_dir": directory, "name": f"{name}_{processes}"}
            settings = [f"--{key}={value}" for key, value in given.items()]
            runs.append(Run(f"{name}_{processes}", ["fit", *files, *settings], processes, spoiled))
    said = in_forks(directory, runs)
    return {run.name: found(directory / run.name / "version_0", said[run.name]) for run in runs}


def found(path: Path, said: str) -> Ended:
    """Of a run that went back once."""
    checkpoint = torch.load(path / "checkpoints" / f"step_{STEPS:06d}.ckpt", weights_only=True)
    (own,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("PPLDelta"))
    assert own["rollbacks"] == 1
    return Ended(path, checkpoint["state_dict"], said)


def test_a_bad_task_is_skipped_by_one_process_and_by_two(ended: dict[str, Ended]) -> None:
    """Task 5 of epoch 0 is in the third batch, where it is the second process's."""
    said = ended["task_1"].said
    assert "training goes back from step 3 to step 0, rollback 1 of 3: the loss of step 3 is nan" in said
    assert "0 to 12 of the training stream are skipped" in said
    assert_same(ended["task_1"], ended["task_2"], target=0)


def test_a_spike_on_one_of_two_processes_takes_both_back_to_the_same_state(ended: dict[str, Ended]) -> None:
    """Tasks 5 and 7 of epoch 0 are the second process's, in the batches of steps 3 and 4."""
    assert "training goes back from step 4 to step 1" in ended["spike_1"].said
    assert_same(ended["spike_1"], ended["spike_2"], target=1)


def assert_same(one: Ended, two: Ended, *, target: int) -> None:
    """Runs of one process and of two end with the same weights and records, after one rollback to a step."""
    for name, weight in one.weights.items():
        assert weight.isfinite().all()
        torch.testing.assert_close(two.weights[name], weight, rtol=1e-5, atol=1e-7)
    tables = [read_metrics(run.path / "metrics.jsonl") for run in (one, two)]
    for table in tables:
        assert table["step"].tolist() == list(range(1, STEPS + 1))
        assert table["attempt"].tolist() == [1] * target + [2] * (STEPS - target)
        assert table["rollback_count"].tolist() == [0.0] * target + [1.0] * (STEPS - target)
    for column in ("loss", "perplexity", "ppl_delta"):
        assert tables[1][column].tolist() == pytest.approx(tables[0][column].tolist(), rel=1e-5, abs=1e-6)
