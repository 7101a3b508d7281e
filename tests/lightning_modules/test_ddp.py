"""Two processes with half of every meta-batch each are one process with all of it."""

from pathlib import Path

import pytest
import torch
from forked_runs import Run, in_forks

from callbacks import read_metrics

STEPS = 2
# One plain gradient step at rate 1, so that the change of the weights is the meta-gradient.
SMALL = {
    "model.init_args.width": 8,
    "model.init_args.optimizer": "torch.optim.SGD",
    "model.init_args.optimizer.init_args.lr": 1.0,
    "data.init_args.width": 8,
    "data.init_args.length": 6,
    "data.init_args.val_tasks": 6,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": STEPS,
}
TWO = {"trainer.strategy": "ddp", "trainer.devices": 2}
MODES = ("FULL", "FO_STRICT")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the runs of every mode, by one process and by two."""
    directory = tmp_path_factory.mktemp("runs")
    runs = []
    for mode in MODES:
        for processes, more in ((1, {}), (2, TWO)):
            name = f"{mode}_{processes}"
            given = SMALL | more | {"save_dir": directory, "name": name, "model.init_args.mode": mode}
            settings = [f"--{key}={value}" for key, value in given.items()]
            runs.append(Run(name, ["fit", "--config", "configs/meta_seqcls.yaml", *settings], processes))
    in_forks(directory, runs)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_take_the_outer_step_of_one(runs: Path, mode: str) -> None:
    one, two = (runs / f"{mode}_{processes}" / "version_0" for processes in (1, 2))
    alone, shared = (
        torch.load(run / "checkpoints" / f"step_{STEPS:06d}.ckpt", weights_only=True)["state_dict"]
        for run in (one, two)
    )
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, rtol=1e-5, atol=1e-7)
    rows = [read_metrics(run / "metrics.jsonl") for run in (one, two)]
    for column in ("loss", "query_accuracy", "support_loss_after", "grad_norm_k_proj"):
        assert rows[1][column].tolist() == pytest.approx(rows[0][column].tolist(), rel=1e-5)
