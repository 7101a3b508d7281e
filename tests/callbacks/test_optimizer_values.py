"""Which optimiser values count after a resume: the configured ones where the configuration changed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from callbacks import ConfiguredOptimizerValues, ResumableCheckpoint
from lightning_modules.checkpoint_io import read_checkpoint

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # four numbers need no workers, and a resume in the middle of these is not the subject
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning"),
]

Groups = list[dict[str, Any]]


class Module(LightningModule):
    """Steps its optimiser and scheduler by hand and keeps the rates it used."""

    def __init__(
        self, optimizer: Callable[..., Optimizer], scheduler: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.bias = torch.nn.Parameter(torch.ones(2))
        self.optimizer, self.scheduler = optimizer, scheduler
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([{"params": [self.weight]}, {"params": [self.bias], "weight_decay": 0.5}])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(((self.weight + self.bias) * batch).square().sum())
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()


def fit(
    directory: Path,
    steps: int,
    optimizer: Callable[..., Optimizer],
    scheduler: Callable[..., Any] | None = None,
    *,
    resumed_from: Path | None = None,
    record: bool = True,
    accelerator: str = "cpu",
) -> tuple[Module, Groups]:
    module = Module(optimizer, scheduler)
    values = [ConfiguredOptimizerValues()] if record else []
    trainer = Trainer(
        accelerator=accelerator,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*values, ResumableCheckpoint(1, dirpath=str(directory))],
    )
    trainer.fit(module, DataLoader(torch.arange(1.0, 9.0), batch_size=1), ckpt_path=resumed_from)
    return module, [dict(group) for group in trainer.optimizers[0].param_groups]


def test_another_rate_counts(tmp_path: Path) -> None:
    fit(tmp_path / "a", 3, partial(Adam, lr=0.1))
    module, groups = fit(
        tmp_path / "b", 5, partial(Adam, lr=0.025), resumed_from=tmp_path / "a/step_000003.ckpt"
    )
    assert module.rates == [0.025, 0.025]
    assert [group["lr"] for group in groups] == [0.025, 0.025]


def test_the_same_configuration_changes_nothing(tmp_path: Path) -> None:
    configuration = partial(AdamW, lr=0.1, betas=(0.8, 0.99)), partial(lr_scheduler.ExponentialLR, gamma=0.7)
    whole, whole_groups = fit(tmp_path / "whole", 5, *configuration)
    fit(tmp_path / "a", 3, *configuration)
    rest, groups = fit(tmp_path / "b", 5, *configuration, resumed_from=tmp_path / "a/step_000003.ckpt")
    assert rest.rates == whole.rates[3:]
    for group, expected in zip(groups, whole_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in expected.items() if k != "params"
        }


def test_every_other_value_counts_where_it_changed(tmp_path: Path) -> None:
    first = partial(SGD, lr=0.1, momentum=0.5, nesterov=False)
    fit(tmp_path / "a", 2, first)
    _, groups = fit(
        tmp_path / "b",
        3,
        partial(SGD, lr=0.1, momentum=0.75, nesterov=True),
        resumed_from=tmp_path / "a/step_000002.ckpt",
    )
    assert [(group["momentum"], group["nesterov"]) for group in groups] == [(0.75, True), (0.75, True)]
    assert [group["weight_decay"] for group in groups] == [0, 0.5]


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(lr_scheduler.ExponentialLR, gamma=0.7),
        partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
        partial(lr_scheduler.MultiStepLR, milestones=[1, 4], gamma=0.5),
        partial(lr_scheduler.CosineAnnealingLR, T_max=10),
        partial(lr_scheduler.LinearLR, start_factor=0.5, total_iters=6),
        partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    ],
    ids=lambda scheduler: scheduler.func.__name__,
)
def test_a_scheduled_rate_goes_on_from_the_new_one(tmp_path: Path, scheduler: Callable[..., Any]) -> None:
    whole, _ = fit(tmp_path / "whole", 6, partial(SGD, lr=0.2), scheduler)
    fit(tmp_path / "a", 3, partial(SGD, lr=0.1), scheduler)
    same, _ = fit(
        tmp_path / "b", 6, partial(SGD, lr=0.1), scheduler, resumed_from=tmp_path / "a/step_000003.ckpt"
    )
    other, _ = fit(
        tmp_path / "c", 6, partial(SGD, lr=0.2), scheduler, resumed_from=tmp_path / "a/step_000003.ckpt"
    )
    assert other.rates == pytest.approx(whole.rates[3:], rel=1e-12)
    assert same.rates == pytest.approx([rate / 2 for rate in whole.rates[3:]], rel=1e-12)


def test_a_scheduler_configured_otherwise_counts(tmp_path: Path) -> None:
    optimizer = partial(SGD, lr=1.0)
    fit(tmp_path / "a", 2, optimizer, partial(lr_scheduler.ExponentialLR, gamma=0.5))
    module, _ = fit(
        tmp_path / "b",
        5,
        optimizer,
        partial(lr_scheduler.ExponentialLR, gamma=0.1),
        resumed_from=tmp_path / "a/step_000002.ckpt",
    )
    assert module.rates == pytest.approx([0.25, 0.025, 0.0025])


def test_without_a_record_the_checkpoint_counts_as_configured_as_it_was(tmp_path: Path) -> None:
    fit(tmp_path / "a", 3, partial(SGD, lr=0.1), record=False)
    checkpoint = read_checkpoint(tmp_path / "a/step_000003.ckpt")
    assert not any("ConfiguredOptimizerValues" in key for key in checkpoint["callbacks"])
    module, _ = fit(tmp_path / "b", 4, partial(SGD, lr=0.3), resumed_from=tmp_path / "a/step_000003.ckpt")
    assert module.rates == [0.3]


def test_a_rate_in_a_tensor_is_changed_in_place(tmp_path: Path) -> None:
    fit(tmp_path / "a", 2, lambda groups: SGD(groups, lr=torch.tensor(0.5)))
    made: list[torch.Tensor] = []

    def optimizer(groups: Any) -> Optimizer:
        made.append(torch.tensor(0.25))
        return SGD(groups, lr=made[-1])

    _, groups = fit(tmp_path / "b", 3, optimizer, resumed_from=tmp_path / "a/step_000002.ckpt")
    assert isinstance(groups[0]["lr"], torch.Tensor)
    assert float(groups[0]["lr"]) == 0.25


@pytest.mark.gpu
def test_a_fused_optimiser_takes_over_the_state_of_one_that_was_not(tmp_path: Path) -> None:
    fit(tmp_path / "a", 2, partial(Adam, lr=0.1), accelerator="gpu")
    module, groups = fit(
        tmp_path / "b",
        3,
        partial(Adam, lr=0.1, fused=True),
        resumed_from=tmp_path / "a/step_000002.ckpt",
        accelerator="gpu",
    )
    assert [group["fused"] for group in groups] == [True, True]
    assert module.rates == [0.1]


def test_the_record_is_what_was_configured_not_where_the_scheduler_is(tmp_path: Path) -> None:
    fit(tmp_path, 3, partial(SGD, lr=1.0), partial(lr_scheduler.ExponentialLR, gamma=0.5))
    record = read_checkpoint(tmp_path / "step_000003.ckpt")["callbacks"]["ConfiguredOptimizerValues"]
    assert [group["lr"] for group in record["optimizers"][0]] == [1.0, 1.0]
    assert record["schedulers"][0]["gamma"] == 0.5
