"""Rollbacks of the meta-learning job, as configured: from the command line, alone and with two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def fit(directory: Path, task: int, **arguments: object) -> tuple[Path, dict[str, torch.Tensor], str]:
    """The run directory, its last weights, and what the run said."""
    given = SMALL | {"save_dir": directory}
    settings = [f"--{name}={value}" for name, value in given.items()]
    settings += [f"--{name.replace('__', '.')}={value}" for name, value in arguments.items()]
    command = [
        sys.executable,
        str(PROGRAM),
        str(task),
        "fit",
        "--config",
        "configs/meta_seqcls.yaml",
        *settings,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    path = directory / "meta_seqcls" / "version_0"
    checkpoint = torch.load(path / "checkpoints" / f"step_{STEPS:06d}.ckpt", weights_only=True)
    (own,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("PPLDelta"))
    assert own["rollbacks"] == (1 if task >= 0 else 0)
    return path, checkpoint["state_dict"], run.stderr


@pytest.mark.slow
def test_a_bad_task_is_skipped_by_one_process_and_by_two(tmp_path: Path) -> None:
    """Task 5 of epoch 0 is in the third batch, where it is the second process's."""
    one, alone, said = fit(tmp_path / "one", 5)
    assert "training goes back from step 3 to step 0, rollback 1 of 3: the loss of step 3 is nan" in said
    assert "0 to 12 of the training stream are skipped" in said
    two, shared, _ = fit(tmp_path / "two", 5, trainer__strategy="ddp", trainer__devices=2)
    for name, weight in alone.items():
        assert weight.isfinite().all()
        torch.testing.assert_close(shared[name], weight, rtol=1e-5, atol=1e-7)
    tables = [read_metrics(run / "metrics.jsonl") for run in (one, two)]
    for table in tables:
        assert table["step"].tolist() == list(range(1, STEPS + 1))
        assert set(table["attempt"]) == {2}
        assert set(table["rollback_count"]) == {1.0}
    for column in ("loss", "perplexity", "ppl_delta"):
        assert tables[1][column].tolist() == pytest.approx(tables[0][column].tolist(), rel=1e-5, abs=1e-6)
