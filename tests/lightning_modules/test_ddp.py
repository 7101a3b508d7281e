"""Two processes with half of every meta-batch each are one process with all of it."""

from pathlib import Path

import pytest
import torch
from forked_runs import ACCELERATORS, Run, in_forks, in_processes

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
    "trainer.log_every_n_steps": 1,
    "trainer.val_check_interval": STEPS,
}
TWO = {"trainer.strategy": "ddp", "trainer.devices": 2}
MODES = ("FULL", "FO_STRICT")
RESUMED = [(1, 2), (2, 1)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=ACCELERATORS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the runs of every mode, by one process and by two, and of some that go on."""
    directory = tmp_path_factory.mktemp("runs")

    def run(name: str, processes: int, mode: str, steps: int, *more: str) -> Run:
        given = SMALL | (TWO if processes == 2 else {}) | {"save_dir": directory, "name": name}
        given |= {"model.init_args.mode": mode, "trainer.max_steps": steps}
        given |= {"trainer.accelerator": request.param}
        settings = [f"--{key}={value}" for key, value in given.items()]
        return Run(name, ["fit", "--config", "configs/meta_seqcls.yaml", *settings, *more], processes)

    begun = [run(f"{mode}_{count}", count, mode, STEPS) for mode in MODES for count in (1, 2)]
    begun.append(run("whole", 1, "FULL", 2 * STEPS))
    resumed = [
        run(
            f"{source}_to_{count}",
            count,
            "FULL",
            2 * STEPS,
            f"--ckpt_path={checkpoint(directory, f'FULL_{source}', STEPS)}",
        )
        for source, count in RESUMED
    ]
    if request.param == "cpu":
        in_forks(directory, begun + resumed)
    else:
        for stage in (begun, resumed):
            in_processes(directory, stage)
    return directory


def checkpoint(directory: Path, name: str, step: int) -> Path:
    return directory / name / "version_0" / "checkpoints" / f"step_{step:06d}.ckpt"


def assert_same(runs: Path, names: tuple[str, str], last_step: int, steps: slice = slice(None)) -> None:
    """Two runs end with the same weights, the second after the same steps as a part of the first."""
    weights = [
        torch.load(checkpoint(runs, name, last_step), map_location="cpu", weights_only=True)["state_dict"]
        for name in names
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)
    rows = [read_metrics(runs / name / "version_0" / "metrics.jsonl") for name in names]
    for column in ("step", "loss", "query_accuracy", "support_loss_after", "grad_norm_k_proj"):
        assert rows[1][column].tolist() == pytest.approx(rows[0][column].tolist()[steps], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_take_the_outer_step_of_one(runs: Path, mode: str) -> None:
    assert_same(runs, (f"{mode}_1", f"{mode}_2"), STEPS)


@pytest.mark.parametrize(("source", "processes"), RESUMED)
def test_a_checkpoint_goes_on_with_another_number_of_processes(
    runs: Path, source: int, processes: int
) -> None:
    assert_same(runs, ("whole", f"{source}_to_{processes}"), 2 * STEPS, slice(STEPS, None))
