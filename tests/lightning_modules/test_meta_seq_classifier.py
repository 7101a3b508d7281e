"""The outer loop: what a step does to the parameters, what validation measures and what is refused."""

import copy
import gc
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy import stats

from datamodules import SyntheticSeqCls
from lightning_modules import MetaSeqClassifier
from theria.maml import adaptation_curve, meta_gradient
from theria.tasks.synthetic_seqcls import SeqClsSpec, TaskBatch, sample_tasks

SIZES = {
    "length": 6,
    "width": 8,
    "num_classes": 3,
    "num_signal_positions": 2,
    "support_size": 4,
    "query_size": 5,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # the tests are about numbers, not about how many processes read the data
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]


def data(**changes: Any) -> SyntheticSeqCls:
    options = {"meta_batch_size": 4, "train_tasks_per_epoch": 32, "val_tasks": 6, "test_tasks": 10} | SIZES
    return SyntheticSeqCls(**(options | changes))


def module(**changes: Any) -> MetaSeqClassifier:
    torch.manual_seed(0)
    return MetaSeqClassifier(**({"width": 8, "num_classes": 3, "inner_steps": 2} | changes))


def trainer(**changes: Any) -> Trainer:
    options = {
        "accelerator": "cpu",
        "max_steps": 3,
        "limit_val_batches": 0,
        "inference_mode": False,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**(options | changes))


def tasks(stream: str, ids: range) -> TaskBatch:
    return sample_tasks(
        SeqClsSpec(**SIZES), torch.arange(ids.start, ids.stop), seed=0, epoch=0, stream=stream
    )


@pytest.mark.parametrize("mode", ["FULL", "FO", "FO_STRICT"])
@pytest.mark.parametrize("strategy", ["unrolled", "sweep"])
def test_a_fit_is_adam_on_the_meta_gradient(mode, strategy):
    fitted = module(mode=mode, strategy=strategy)
    model = copy.deepcopy(fitted.model)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    rows = []
    fitted.step_metrics.subscribe(rows.extend)
    trainer().fit(fitted, datamodule=data())
    for step in range(3):
        batch = tasks("train", range(4 * step, 4 * step + 4))
        support, query = (batch.support_x, batch.support_y), (batch.query_x, batch.query_y)
        expected = meta_gradient(
            model, support, query, mode=mode, inner_steps=2, inner_lr=0.4, strategy=strategy, diagnostics=True
        )
        for name, parameter in model.named_parameters():
            parameter.grad = expected.grads[name]
        adam.step()
        row = rows[step]
        assert row["step"] == step + 1
        assert row["loss"] == expected.loss.item()
        assert row["support_loss_after"] == expected.support_loss_after.item()
        assert row["query_accuracy_before"] == expected.query_accuracy_before.item()
        assert row["grad_norm_k_proj"] == pytest.approx(
            expected.grads["k_proj.weight"].norm().item(), rel=1e-6
        )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(fitted.model.named_parameters())[name], parameter, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["FULL", "FO_STRICT"])
@pytest.mark.parametrize("strategy", ["unrolled", "sweep"])
def test_gradients_reach_the_parameters_through_their_hooks(mode, strategy):
    fitted = module(mode=mode, strategy=strategy)
    fired = []
    for name, parameter in fitted.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    trainer(max_steps=1).fit(fitted, datamodule=data())
    assert sorted(fired) == sorted(name for name, _ in fitted.model.named_parameters())


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_reports_means_and_intervals_over_all_tasks(stage):
    fitted = module()
    runner = trainer(limit_val_batches=None)
    call = runner.validate if stage == "val" else runner.test
    (logged,) = call(fitted, datamodule=data(), verbose=False)
    stream, count = ("validation", 6) if stage == "val" else ("test", 10)
    batch = tasks(stream, range(count))
    curve = adaptation_curve(
        fitted.model,
        (batch.support_x, batch.support_y),
        (batch.query_x, batch.query_y),
        inner_steps=2,
        inner_lr=0.4,
    )
    accuracy = curve.query_accuracy.double()
    for step in range(3):
        assert logged[f"{stage}/query_accuracy_step_{step:02d}"] == pytest.approx(
            accuracy[step].mean().item()
        )
    assert logged[f"{stage}/query_accuracy"] == pytest.approx(accuracy[-1].mean().item())
    assert logged[f"{stage}/query_accuracy_before"] == pytest.approx(accuracy[0].mean().item())
    assert logged[f"{stage}/query_loss"] == pytest.approx(curve.query_loss[-1].mean().item(), rel=1e-6)
    assert logged[f"{stage}/support_loss_after"] == pytest.approx(
        curve.support_loss[-1].mean().item(), rel=1e-6
    )
    half = stats.t.ppf(0.975, count - 1) * stats.sem(accuracy[-1].numpy())
    assert logged[f"{stage}/query_accuracy_ci95"] == pytest.approx(half, rel=1e-6)


def test_a_second_validation_forgets_the_first():
    runner, fitted = trainer(limit_val_batches=None), module()
    runner.validate(fitted, datamodule=data(seed=1), verbose=False)
    (second,) = runner.validate(fitted, datamodule=data(), verbose=False)
    (alone,) = trainer(limit_val_batches=None).validate(module(), datamodule=data(), verbose=False)
    assert second == alone


class CountTensors(Callback):
    """Live tensors after some validation batches."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx in (20, 199):
            gc.collect()
            self.counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))


def test_memory_is_flat_over_200_validation_batches():
    counter = CountTensors()
    runner = trainer(limit_val_batches=None, callbacks=[counter])
    runner.validate(module(), datamodule=data(meta_batch_size=1, val_tasks=200), verbose=False)
    assert len(counter.counts) == 2
    assert counter.counts[0] == counter.counts[1]


def test_a_scheduler_steps_once_an_outer_step():
    fitted = module(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    rows = []
    fitted.step_metrics.subscribe(rows.extend)
    trainer().fit(fitted, datamodule=data())
    assert fitted.optimizers().param_groups[0]["lr"] == pytest.approx(1e-3 / 8)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 5e-4, 2.5e-4])  # those used


def test_inference_mode_is_refused_by_name():
    runner = trainer(limit_val_batches=None, inference_mode=True)
    with pytest.raises(MisconfigurationException, match=r"trainer\.inference_mode to false"):
        runner.validate(module(), datamodule=data(), verbose=False)


def test_a_cuda_graph_on_a_cpu_is_refused_by_name():
    with pytest.raises(MisconfigurationException, match="cuda_graph is on, but the batch is on cpu"):
        trainer().fit(module(cuda_graph="on"), datamodule=data())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "SECOND"}, "MetaMode 'SECOND'"),
        ({"strategy": "magic"}, "Strategy 'magic'"),
        ({"cuda_graph": "maybe"}, "cuda_graph must be"),
        ({"inner_steps": -1}, "inner_steps"),
        ({"inner_lr": float("inf")}, "inner_lr"),
        ({"adapt": ["tail"]}, "adapt names 'tail'"),
        ({"mode": "FO", "inner_checkpoint": 2}, "inner_checkpoint"),
    ],
)
def test_impossible_settings_are_refused_before_any_training(change, message):
    with pytest.raises(ValueError, match=message):
        module(**change)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["unrolled", "sweep"])
def test_a_captured_fit_equals_an_eager_one(strategy):
    parameters = []
    for choice in ("on", "off"):
        fitted = module(cuda_graph=choice, strategy=strategy)
        trainer(accelerator="cuda", devices=1, max_steps=20).fit(fitted, datamodule=data())
        parameters.append([p.detach().cpu().clone() for p in fitted.parameters()])
    for captured, eager in zip(*parameters, strict=True):
        torch.testing.assert_close(captured, eager, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_second_fit_captures_anew():
    fitted, fresh = module(cuda_graph="on"), module(cuda_graph="off")
    for _ in range(2):
        for each in (fitted, fresh):
            trainer(accelerator="cuda", devices=1, max_steps=3).fit(each, datamodule=data())
    for a, b in zip(fitted.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class ForbidSynchronisation(Callback):
    """Any wait for the device between two batches is an error, once the graphs are captured."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 4:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_nothing_waits_for_the_device_between_logged_steps():
    try:
        trainer(
            accelerator="cuda",
            devices=1,
            max_steps=30,
            log_every_n_steps=1000,
            callbacks=[ForbidSynchronisation()],
        ).fit(module(), datamodule=data(train_tasks_per_epoch=400))
    finally:
        torch.cuda.set_sync_debug_mode("default")
