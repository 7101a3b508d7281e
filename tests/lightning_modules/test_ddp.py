"""Two processes with half of every meta-batch each are one process with all of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from callbacks import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.init_args.width": 8,
    "data.init_args.width": 8,
    "data.init_args.length": 6,
    "data.init_args.val_tasks": 6,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
}


def fit(directory: Path, steps: int, **arguments: object) -> tuple[Path, dict[str, torch.Tensor]]:
    """Run the command line; the run directory and the weights of its last checkpoint."""
    given = SMALL | {"save_dir": directory, "trainer.max_steps": steps, "trainer.val_check_interval": steps}
    settings = [f"--{name.replace('__', '.')}={value}" for name, value in (given | arguments).items()]
    command = [sys.executable, "-m", "lightning_modules.cli", "fit", "--config", "configs/meta_seqcls.yaml"]
    run = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    (path,) = directory.glob("meta_seqcls/version_0")
    (checkpoint,) = path.glob(f"checkpoints/*{steps:06d}.ckpt")
    return path, torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["FULL", "FO_STRICT"])
def test_two_processes_take_the_outer_step_of_one(tmp_path, mode):
    """One plain gradient step at rate 1, so that the change of the weights is the meta-gradient."""
    sgd = {"model__init_args__mode": mode, "model__init_args__optimizer": "torch.optim.SGD"}
    sgd["model__init_args__optimizer__init_args__lr"] = 1.0
    one, alone = fit(tmp_path / "one", 2, **sgd)
    two, shared = fit(tmp_path / "two", 2, trainer__strategy="ddp", trainer__devices=2, **sgd)
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, rtol=1e-5, atol=1e-7)
    rows = [read_metrics(run / "metrics.jsonl") for run in (one, two)]
    for column in ("loss", "query_accuracy", "support_loss_after", "grad_norm_k_proj"):
        assert rows[1][column].tolist() == pytest.approx(rows[0][column].tolist(), rel=1e-5)
