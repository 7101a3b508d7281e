"""The tasks a module receives: the right ones on any workers and ranks, and after a resume from anywhere."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from datamodules import SyntheticSeqCls
from theria.tasks import TaskBatch, sample_tasks

pytestmark = [
    # Python 3.12 warns of every fork in a process with threads, which PyTorch always is.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # These tests are about the CPU, also where there is a GPU.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # Lightning looks for this class in torch.utils._pytree at every batch transfer.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

SETTINGS: dict[str, Any] = {
    "length": 4,
    "width": 2,
    "num_signal_positions": 1,
    "support_size": 2,
    "query_size": 3,
    "meta_batch_size": 2,
    "train_tasks_per_epoch": 8,
    "val_tasks": 3,
    "test_tasks": 5,
    "seed": 11,
}
EPOCHS = 3
BATCHES = 4

Seen = tuple[list[int], float]


def fingerprint(batch: TaskBatch) -> Seen:
    """The numbers of a batch's tasks and, since these start again every epoch, a sum of what is in them."""
    return batch.task_ids.tolist(), batch.support_x.sum().item()


class Recorder(pl.LightningModule):
    """Manual optimisation of one parameter; keeps what it is given."""

    def __init__(self, fail_in_step: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.fail_in_step = fail_in_step
        self.trained: list[Seen] = []
        self.validated: list[tuple[int, Seen]] = []
        self.tested: list[Seen] = []
        self.batches: list[TaskBatch] = []

    def training_step(self, batch: TaskBatch, batch_idx: int) -> None:
        if self.fail_in_step == len(self.trained):
            raise RuntimeError("the step failed")
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.parameter * batch.support_x.mean())
        optimizer.step()
        self.trained.append(fingerprint(batch))
        self.batches.append(batch)

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        self.validated.append((len(self.trained), fingerprint(batch)))

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        self.tested.append(fingerprint(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(pl.Callback):
    """A checkpoint in every hook where callbacks save, with the number of steps done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints: dict[Path, int] = {}

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, hook: str) -> None:
        if not trainer.sanity_checking:
            path = self.folder / f"{hook}-{len(module.trained)}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            self.checkpoints[path] = len(module.trained)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self._save(trainer, module, "batch_end")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer, module, "validation_end")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer, module, "epoch_end")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._save(trainer, module, "exception")


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            "max_epochs": EPOCHS,
        }
        | settings
    )


def expected_stream(steps: int, **changes: Any) -> list[Seen]:
    """What uninterrupted training sees, from sample_tasks itself."""
    data = SyntheticSeqCls(**SETTINGS | changes)
    size = data.meta_batch_size
    seen = []
    for step in range(steps):
        epoch, batch = divmod(step, data.train_tasks_per_epoch // size)
        ids = torch.arange(batch * size, (batch + 1) * size)
        seen.append(fingerprint(sample_tasks(data.spec, ids, seed=data.seed, epoch=epoch, stream="train")))
    return seen


def fit(folder: Path, *, num_workers: int, **settings: Any) -> tuple[Recorder, dict[Path, int]]:
    """An uninterrupted run that saves wherever it can."""
    module, saver = Recorder(), SaveEverywhere(folder)
    trainer(saver, **settings).fit(module, SyntheticSeqCls(**SETTINGS, num_workers=num_workers))
    assert module.trained == expected_stream(steps_of(settings))
    return module, saver.checkpoints


def steps_of(settings: dict[str, Any]) -> int:
    """Training steps of a trainer with these."""
    return int(settings.get("max_steps", settings.get("max_epochs", EPOCHS) * BATCHES))


BY_STEPS = {"max_steps": EPOCHS * BATCHES, "max_epochs": -1}


@pytest.mark.parametrize(
    ("settings", "num_workers"),
    [
        pytest.param({}, 0, id="epochs"),
        pytest.param({"val_check_interval": 2}, 0, id="epochs-validated-inside"),
        # two epochs, since each of every resumed run starts and ends four processes
        pytest.param({"max_epochs": 2}, 2, id="epochs-workers"),
        pytest.param(BY_STEPS, 0, id="steps"),
        pytest.param(BY_STEPS | {"max_steps": 2 * BATCHES}, 2, id="steps-workers"),
        pytest.param(
            BY_STEPS | {"val_check_interval": 3, "check_val_every_n_epoch": None},
            0,
            id="steps-validated-across",
        ),
    ],
)
def test_resume_from_every_checkpoint_sees_what_the_uninterrupted_run_saw(
    settings: dict[str, Any], num_workers: int, tmp_path: Path
) -> None:
    whole, checkpoints = fit(tmp_path, num_workers=num_workers, **settings)
    unfinished = {path: done for path, done in checkpoints.items() if done < steps_of(settings)}
    assert {path.name.split("-")[0] for path in unfinished} == {"batch_end", "validation_end", "epoch_end"}
    for path, done in unfinished.items():
        module = Recorder()
        data = SyntheticSeqCls(**SETTINGS, num_workers=num_workers)
        trainer(**settings).fit(module, data, ckpt_path=path, weights_only=True)
        assert module.trained == whole.trained[done:], path.name
        if "batch_end" not in path.name:
            validated = [(done + step, seen) for step, seen in module.validated]
            assert validated == [v for v in whole.validated if v[0] > done], path.name


def test_a_limit_on_batches_resumes_as_it_would_have_gone_on(tmp_path: Path) -> None:
    module, saver = Recorder(), SaveEverywhere(tmp_path)
    trainer(saver, limit_train_batches=3).fit(module, SyntheticSeqCls(**SETTINGS))
    assert module.trained == expected_stream(9)
    for path, done in saver.checkpoints.items():
        if done < 9:
            resumed = Recorder()
            trainer(limit_train_batches=3).fit(
                resumed, SyntheticSeqCls(**SETTINGS), ckpt_path=path, weights_only=True
            )
            assert resumed.trained == module.trained[done:], path.name


@pytest.mark.parametrize("step", [0, 3, 4, 6])
def test_a_batch_whose_step_was_interrupted_is_played_again(step: int, tmp_path: Path) -> None:
    module, saver = Recorder(fail_in_step=step), SaveEverywhere(tmp_path)
    with pytest.raises(RuntimeError, match="the step failed"):
        trainer(saver).fit(module, SyntheticSeqCls(**SETTINGS))
    resumed = Recorder()
    checkpoint = tmp_path / f"exception-{step}.ckpt"
    trainer().fit(resumed, SyntheticSeqCls(**SETTINGS), ckpt_path=checkpoint, weights_only=True)
    assert module.trained + resumed.trained == expected_stream(EPOCHS * BATCHES)


def test_resume_with_other_sizes_is_an_error_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    _, checkpoints = fit(tmp_path, num_workers=0)
    changed = SETTINGS | {"meta_batch_size": 4}
    middle = next(path for path, done in checkpoints.items() if done == BATCHES + 1)
    with (
        pytest.warns(match=r"meta_batch_size = 2 \(now 4\)"),
        pytest.raises(ValueError, match=r"1 batches into an epoch of 8 items in batches of 2.*batches of 4"),
    ):
        trainer().fit(Recorder(), SyntheticSeqCls(**changed), ckpt_path=middle, weights_only=True)
    end = tmp_path / f"epoch_end-{BATCHES}.ckpt"
    module = Recorder()
    with pytest.warns(match=r"meta_batch_size = 2 \(now 4\)"):
        trainer().fit(module, SyntheticSeqCls(**changed), ckpt_path=end, weights_only=True)
    assert module.trained == expected_stream(6, meta_batch_size=4)[2:]


def test_resume_with_another_seed_warns_and_takes_it(tmp_path: Path) -> None:
    _, checkpoints = fit(tmp_path, num_workers=0)
    middle = next(path for path, done in checkpoints.items() if done == 2)
    module = Recorder()
    with pytest.warns(match=r"seed = 11 \(now 12\)"):
        trainer().fit(module, SyntheticSeqCls(**SETTINGS | {"seed": 12}), ckpt_path=middle, weights_only=True)
    assert module.trained == expected_stream(EPOCHS * BATCHES, seed=12)[2:]


def test_testing_a_checkpoint_on_other_tasks_is_no_resume(tmp_path: Path) -> None:
    _, checkpoints = fit(tmp_path, num_workers=0)
    module = Recorder()
    other = SyntheticSeqCls(**SETTINGS | {"noise": 2.0})
    # Any warning fails this test.
    trainer().test(module, other, ckpt_path=next(iter(checkpoints)), weights_only=True)
    assert [ids for ids, _ in module.tested] == [[0, 1], [2, 3], [4]]


def test_a_trainer_that_fits_again_goes_on_and_a_new_one_begins_again() -> None:
    data, module = SyntheticSeqCls(**SETTINGS), Recorder()
    first = trainer(max_epochs=1)
    first.fit(module, data)
    first.fit_loop.max_epochs = 2
    first.fit(module, data)
    assert module.trained == expected_stream(2 * BATCHES)
    again = Recorder()
    trainer(max_epochs=1).fit(again, data)
    assert again.trained == expected_stream(BATCHES)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_are_their_own_and_validation_is_the_same_every_epoch(num_workers: int) -> None:
    data = SyntheticSeqCls(**SETTINGS, num_workers=num_workers)
    module = Recorder()
    runner = trainer()
    runner.fit(module, data)
    runner.test(module, data, verbose=False)

    def expected(stream: str, sizes: list[list[int]]) -> list[Seen]:
        return [
            fingerprint(sample_tasks(data.spec, torch.tensor(ids), seed=11, epoch=0, stream=stream))
            for ids in sizes
        ]

    validation = expected("validation", [[0, 1], [2]])
    assert [seen for _, seen in module.validated] == validation * EPOCHS
    assert module.tested == expected("test", [[0, 1], [2, 3], [4]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_module_receives_the_tasks_bit_for_bit(num_workers: int) -> None:
    data, module = SyntheticSeqCls(**SETTINGS, num_workers=num_workers), Recorder()
    trainer(max_epochs=1).fit(module, data)
    expected = sample_tasks(data.spec, torch.tensor([2, 3]), seed=11, epoch=0, stream="train")
    assert isinstance(module.batches[1], TaskBatch)
    assert all(torch.equal(a, b) for a, b in zip(module.batches[1], expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tasks_come_in_the_precision_of_the_trainer(num_workers: int) -> None:
    data, module = SyntheticSeqCls(**SETTINGS, num_workers=num_workers), Recorder()
    trainer(max_steps=1, max_epochs=-1, precision="64-true").fit(module, data)
    assert module.batches[0].support_x.dtype == torch.float64
    assert module.batches[0].support_y.dtype == torch.int64


@pytest.mark.parametrize(("world_size", "meta_batch_size"), [(1, 16), (2, 16), (4, 16), (8, 8), (3, 6)])
def test_ranks_together_see_the_tasks_of_one_process(world_size: int, meta_batch_size: int) -> None:
    settings = SETTINGS | {
        "meta_batch_size": meta_batch_size,
        "train_tasks_per_epoch": 2 * meta_batch_size,
        "val_tasks": 2 * meta_batch_size + 1,
    }

    def batches(rank: int, ranks: int, loader: str) -> list[TaskBatch]:
        data = SyntheticSeqCls(**settings)
        data.trainer = SimpleNamespace(  # the parts of a Trainer that are looked at
            global_rank=rank,
            world_size=ranks,
            precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
            fit_loop=SimpleNamespace(
                epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
            ),
        )
        return [data.on_after_batch_transfer(batch, 0) for batch in getattr(data, loader)()]

    for loader in ("train_dataloader", "val_dataloader"):
        alone = batches(0, 1, loader)
        ranks = [batches(rank, world_size, loader) for rank in range(world_size)]
        for step, whole in enumerate(alone):
            shares = [rank[step] for rank in ranks if step < len(rank)]
            if len(whole.task_ids) == meta_batch_size:
                assert {len(share.task_ids) for share in shares} == {meta_batch_size // world_size}
            order = torch.cat([share.task_ids for share in shares]).argsort()
            for name in TaskBatch._fields:
                together: Tensor = torch.cat([getattr(share, name) for share in shares])[order]
                assert torch.equal(together, getattr(whole, name))


class RankRecorder(Recorder):
    """Leaves what each rank saw, and the averaged gradients of its steps, in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.gradients: list[Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.gradients.append(self.parameter.grad.clone())

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("loss", batch.query_x.mean(), on_epoch=True, sync_dist=True, batch_size=len(batch.task_ids))

    def on_fit_end(self) -> None:
        saw = {
            "train": [ids for ids, _ in self.trained],
            "validation": [ids for _, (ids, _) in self.validated],
        }
        torch.save(
            saw | {"gradients": torch.stack(self.gradients)},
            self.folder / f"rank-{self.trainer.global_rank}.pt",
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a process that used CUDA cannot")
def test_two_processes_train_as_one_and_validate_unevenly_without_hanging(tmp_path: Path) -> None:
    for folder, settings in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        (tmp_path / folder).mkdir()
        trainer(max_epochs=1, **settings).fit(RankRecorder(tmp_path / folder), SyntheticSeqCls(**SETTINGS))
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt") for name in ("one/rank-0", "two/rank-0", "two/rank-1")
    )
    assert first["train"] == [[0], [2], [4], [6]]
    assert second["train"] == [[1], [3], [5], [7]]
    assert (first["validation"], second["validation"]) == ([[0], [2]], [[1]])
    for rank in (first, second):
        torch.testing.assert_close(rank["gradients"], one["gradients"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_batch_size": 0}, "meta_batch_size must be .*got 0"),
        ({"train_tasks_per_epoch": 0}, "train_tasks_per_epoch must be .*got 0"),
        ({"val_tasks": -1}, "val_tasks must be .*got -1"),
        ({"test_tasks": 2**32 + 1}, "test_tasks must be .*got 4294967297"),
        ({"seed": -1}, "seed must be .*got -1"),
        ({"num_workers": -1}, "num_workers must be .*got -1"),
        ({"train_tasks_per_epoch": 9}, "train_tasks_per_epoch = 9 is not a multiple of meta_batch_size = 2"),
        ({"num_signal_positions": 4}, "num_signal_positions must be at most length - 1 = 3"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticSeqCls(**SETTINGS | changes)


def test_a_meta_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    data = SyntheticSeqCls(**SETTINGS)
    data.trainer = SimpleNamespace(global_rank=0, world_size=4)
    with pytest.raises(ValueError, match="meta_batch_size = 2 does not divide over 4 ranks"):
        data.setup("fit")


def test_overfitting_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="overfit_batches must be 0, got 2"):
        trainer(overfit_batches=2).fit(Recorder(), SyntheticSeqCls(**SETTINGS))


def test_every_setting_is_on_the_command_line_and_reaches_the_tasks() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SyntheticSeqCls, "data")
    arguments = [f"--data.{name}={value}" for name, value in SETTINGS.items()]
    data = parser.instantiate(parser.parse_args([*arguments, "--data.noise=0.5"])).data
    assert dataclasses.asdict(data.spec) == {
        name: (SETTINGS | {"noise": 0.5, "num_classes": 5})[name] for name in dataclasses.asdict(data.spec)
    }
    assert (data.meta_batch_size, data.train_tasks_per_epoch, data.val_tasks, data.test_tasks, data.seed) == (
        2,
        8,
        3,
        5,
        11,
    )
