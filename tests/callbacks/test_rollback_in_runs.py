"""Rollbacks of the meta-learning job, as configured: from the command line, alone and with two processes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from callbacks import read_metrics

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("faulty_runs.py")
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
    "trainer.log_every_n_steps": 1,
}


def fit(
    directory: Path, factor: float, tasks: str, *overlays: Path, **arguments: object
) -> tuple[Path, dict[str, torch.Tensor], str]:
    """The run directory, its last weights, and what the run said."""
    given = SMALL | {"save_dir": directory}
    settings = [f"--{name}={value}" for name, value in given.items()]
    settings += [f"--{name.replace('__', '.')}={value}" for name, value in arguments.items()]
    command = [
        sys.executable,
        str(PROGRAM),
        str(factor),
        tasks,
        "fit",
        "--config",
        "configs/meta_seqcls.yaml",
        *(part for overlay in overlays for part in ("--config", str(overlay))),
        *settings,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    path = directory / "meta_seqcls" / "version_0"
    checkpoint = torch.load(path / "checkpoints" / f"step_{STEPS:06d}.ckpt", weights_only=True)
    (own,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("PPLDelta"))
    assert own["rollbacks"] == 1
    return path, checkpoint["state_dict"], run.stderr


@pytest.mark.slow
def test_a_bad_task_is_skipped_by_one_process_and_by_two(tmp_path: Path) -> None:
    """Task 5 of epoch 0 is in the third batch, where it is the second process's."""
    one, alone, said = fit(tmp_path / "one", math.nan, "5")
    assert "training goes back from step 3 to step 0, rollback 1 of 3: the loss of step 3 is nan" in said
    assert "0 to 12 of the training stream are skipped" in said
    two, shared, _ = fit(tmp_path / "two", math.nan, "5", trainer__strategy="ddp", trainer__devices=2)
    assert_same(one, alone, two, shared, target=0)


@pytest.mark.slow
def test_a_spike_on_one_of_two_processes_takes_both_back_to_the_same_state(tmp_path: Path) -> None:
    """Tasks 5 and 7 of epoch 0 are the second process's, in the batches of steps 3 and 4."""
    healer = {
        "every_n_steps": 1,
        "healthy_after": 1,
        "warm_up": 1,
        "baseline_steps": 5,
        "threshold": 0.5,
        "trigger": "plain",
        "skip_window": 1,
        "cool_down": 2,
    }
    overlay = tmp_path / "overlay.yaml"
    names = ["RNGState", "PPLDeltaRollback", "MetricsJSONL", "ResumableCheckpoint"]
    callbacks = [{"class_path": name} | ({"init_args": healer} if "PPL" in name else {}) for name in names]
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    one, alone, said = fit(tmp_path / "one", 50.0, "5,7", overlay)
    assert "training goes back from step 4 to step 1" in said
    two, shared, _ = fit(tmp_path / "two", 50.0, "5,7", overlay, trainer__strategy="ddp", trainer__devices=2)
    assert_same(one, alone, two, shared, target=1)


def assert_same(
    one: Path, alone: dict[str, torch.Tensor], two: Path, shared: dict[str, torch.Tensor], *, target: int
) -> None:
    """Runs of one process and of two end with the same weights and records, after one rollback to a step."""
    for name, weight in alone.items():
        assert weight.isfinite().all()
        torch.testing.assert_close(shared[name], weight, rtol=1e-5, atol=1e-7)
    tables = [read_metrics(run / "metrics.jsonl") for run in (one, two)]
    for table in tables:
        assert table["step"].tolist() == list(range(1, STEPS + 1))
        assert table["attempt"].tolist() == [1] * target + [2] * (STEPS - target)
        assert table["rollback_count"].tolist() == [0.0] * target + [1.0] * (STEPS - target)
    for column in ("loss", "perplexity", "ppl_delta"):
        assert tables[1][column].tolist() == pytest.approx(tables[0][column].tolist(), rel=1e-5, abs=1e-6)
