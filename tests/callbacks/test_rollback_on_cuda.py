"""Watching, refusing and going back on a GPU: without waiting for it, and to the same weights."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from callbacks import MetricsJSONL, PPLDeltaRollback, RNGState, read_metrics
from callbacks.refused_update import UpdateGuard, largest_gradient
from datamodules.loader import BatchIndex, ResumableLoader, Shard
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.step_metrics import StepMetrics

pytestmark = [
    pytest.mark.gpu,
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),  # made on the spot
    pytest.mark.filterwarnings("ignore:training goes back from step:UserWarning"),  # what is tested here
]

DEVICE = "cuda"
STEPS = 40
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.1),
    "fused Adam": functools.partial(torch.optim.Adam, lr=0.1, fused=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.1),
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device in here raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def count_on_host(optimizer: torch.optim.Optimizer) -> None:
    """A counter of steps that is kept on the host moves on with a step that was refused."""
    for state in optimizer.state.values():
        if "step" in state and not state["step"].is_cuda:
            state["step"] += 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_refused_step_changes_nothing_and_an_accepted_one_all_without_waiting(name: str) -> None:
    def parameters() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(5, 3, device=DEVICE).requires_grad_() for _ in range(2)]

    guarded, plain = parameters(), parameters()
    watched, free = OPTIMIZERS[name](guarded), OPTIMIZERS[name](plain)
    guard = UpdateGuard(watched)
    for step, value in enumerate([1.0, torch.nan, 1.0, torch.inf, 1.0]):
        for own, other in zip(guarded, plain, strict=True):
            own.grad = torch.full_like(own, 0.5 + step)
            other.grad = torch.full_like(other, 0.5 + step)
        guarded[0].grad[0, 0] *= value  # type: ignore[index]
        torch.cuda.synchronize()
        with no_waiting():
            largest = largest_gradient(watched)
            assert largest is not None
            guard.refuse_if(~torch.isfinite(largest))
            watched.step()
        if value == 1.0:
            free.step()
        else:
            count_on_host(free)
        for own, other in zip(guarded, plain, strict=True):
            assert torch.equal(own, other)
            for kept, expected in zip(watched.state[own].values(), free.state[other].values(), strict=True):
                assert torch.equal(kept, expected)
    guard.release()


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Batches of a noisy linear relation."""

    def __getitem__(self, index: BatchIndex) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index.epoch * 160 + index.ids.start)
        x = torch.randn(8, 3, generator=generator)
        return x, x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(8, generator=generator)


class Module(LightningModule):
    """Fits the relation; a step's gradient may be spoiled once."""

    def __init__(self, spoiled: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.automatic_optimization = False
        self.step_metrics = StepMetrics(10)
        self.spoiled = spoiled

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        loss = (self.layer(x).squeeze(-1) - y).square().mean()
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.trainer.global_step + 1 == self.spoiled:
            self.spoiled = None
            self.layer.weight.grad[0, 0] = torch.nan  # type: ignore[index]
        optimizer.step()
        self.step_metrics.append(self.trainer.global_step, {"loss": loss.detach()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit(directory: Path, module: Module, *callbacks: Callback) -> None:
    trainer = Trainer(
        accelerator=DEVICE,
        devices=1,
        default_root_dir=directory,
        callbacks=[RNGState(), *callbacks, MetricsJSONL()],
        plugins=[AtomicCheckpointIO()],
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ResumableLoader(Points(), Shard(160, 8)))


def healer() -> PPLDeltaRollback:
    return PPLDeltaRollback(every_n_steps=10, healthy_after=5, warm_up=8, skip_window=0, cool_down=0)


def test_watching_never_waits_within_a_step(tmp_path: Path) -> None:
    watching = healer()

    def without_waiting(hook: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(hook)
        def call(trainer: Trainer, *args: Any) -> None:
            if trainer.global_step < 2 or trainer.global_step % 10 in (0, 9):
                hook(trainer, *args)  # first allocations, and steps whose block of rows is read
                return
            with no_waiting():
                hook(trainer, *args)

        return call

    for name in HOOKS:
        vars(watching)[name] = without_waiting(getattr(watching, name))
    fit(tmp_path, Module(), watching)
    assert watching.rollbacks == 0
    table = read_metrics(tmp_path / "metrics.jsonl")
    assert table["step"].tolist() == list(range(1, STEPS + 1))
    assert not table[["loss", "perplexity", "ppl_delta"]].isna().to_numpy().any()


@pytest.mark.parametrize("step", [1, 27, STEPS])
def test_a_refused_gradient_is_read_a_step_later_and_the_run_ends_as_the_undisturbed_one(
    tmp_path: Path, step: int
) -> None:
    undisturbed, healed, watching = Module(), Module(spoiled=step), healer()
    fit(tmp_path / "plain", undisturbed, healer())
    fit(tmp_path / "healed", healed, watching)
    (rollback,) = watching.history
    assert rollback.fault.first_step == step
    assert rollback.step == min(step + 1, STEPS)
    torch.testing.assert_close(healed.state_dict(), undisturbed.state_dict(), rtol=0, atol=0)
    assert read_metrics(tmp_path / "healed" / "metrics.jsonl")["step"].tolist() == list(range(1, STEPS + 1))
