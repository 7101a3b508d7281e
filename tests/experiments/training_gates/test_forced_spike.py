"""G2-6 passes for the rollback as it is, and fails for each way of doing it wrongly or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch import Tensor
from torch.utils.data import Dataset

from callbacks import MetricsJSONL, PPLDeltaRollback, ResumableCheckpoint, RNGState, read_metrics
from callbacks.rollback_ring import RollbackRing
from datamodules.loader import BatchIndex, ResumableLoader, Shard
from experiments.training_gates.forced_spike import (
    EVERY,
    SHORT_RUN,
    SPIKE_AT,
    STEPS,
    ForcedSpike,
    SpikeRun,
    digest,
    first_attempt,
    spike_gate,
)
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.step_metrics import StepMetrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),  # made on the spot
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:training goes back from step:UserWarning"),  # what is tested here
    pytest.mark.filterwarnings("ignore:training is not healthy:UserWarning"),
]


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Batches of a noisy linear relation."""

    def __getitem__(self, index: BatchIndex) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index.epoch * 1000 + index.ids.start)
        x = torch.randn(32, 3, generator=generator)
        return x, x @ torch.tensor([1.0, -2.0, 0.5]) + 0.5 * torch.randn(32, generator=generator)


class Module(LightningModule):
    """Fits the relation, and keeps rows as MemoryLM does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.step_metrics = StepMetrics()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.last = (self.layer(x).squeeze(-1) - y).square().mean()
        return self.last

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {"loss": self.last.detach(), "total_loss": self.last.detach()}
        self.step_metrics.append(self.trainer.global_step, row)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(Points(), Shard(320, 32))


def train(directory: Path, *, strength: float = 10.0, **changes: Any) -> SpikeRun:
    spike = ForcedSpike(strength=strength)
    rollback = PPLDeltaRollback(**(SHORT_RUN["PPLDeltaRollback"] | changes))
    saving = ResumableCheckpoint(**SHORT_RUN["ResumableCheckpoint"])
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        callbacks=[RNGState(), spike, rollback, MetricsJSONL(), saving],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(Module())
    path = directory / "metrics.jsonl"
    return SpikeRun(spike.visits, SPIKE_AT, STEPS, read_metrics(path), first_attempt(path))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> SpikeRun:
    return train(tmp_path_factory.mktemp("sound"))


def test_it_passes_for_the_rollback_as_it_is(sound):
    gate = spike_gate(sound)
    assert gate.passed, gate
    back = SPIKE_AT - EVERY
    assert f"from step {SPIKE_AT + 1} back to {back}: weights equal, optimiser equal" in gate.measured
    steps = [visit.step for visit in sound.visits]
    assert steps == [*range(0, SPIKE_AT + 1, EVERY), *range(back, STEPS, EVERY)]


def test_the_spike_is_in_the_checkpoint_and_comes_once(sound):
    ruined, again = (visit for visit in sound.visits if visit.step == SPIKE_AT)
    assert {f"rollback_{SPIKE_AT:06d}.ckpt", f"step_{SPIKE_AT:06d}.ckpt"} <= ruined.files
    assert ruined.weights != again.weights
    assert sound.undone["step"].max() == SPIKE_AT + 1


def test_without_a_spike_there_is_nothing_to_show(tmp_path):
    gate = spike_gate(train(tmp_path, strength=0.0))
    assert not gate.passed
    assert "nothing was taken back" in gate.measured


def test_no_rollback_fails(tmp_path):
    gate = spike_gate(train(tmp_path, threshold=1e12))
    assert not gate.passed
    assert "nothing was taken back" in gate.measured


@pytest.mark.parametrize("wait", [0, 10])
def test_a_rollback_to_the_poisoned_checkpoint_fails(tmp_path, monkeypatch, wait):
    """The newest checkpoint, whatever followed it; and the same where training recovers from it."""
    monkeypatch.setattr(RollbackRing, "target", property(lambda self: max(self.steps)))
    gate = spike_gate(train(tmp_path, max_rollbacks=1, at_cap="warn", cool_down=wait))
    assert not gate.passed
    assert f"back to {SPIKE_AT}" in gate.measured


@pytest.mark.parametrize("part", ["restore_model", "restore_optimizers_and_schedulers"])
def test_a_part_that_is_not_restored_fails(tmp_path, monkeypatch, part):
    monkeypatch.setattr(_CheckpointConnector, part, lambda self: None)
    gate = spike_gate(train(tmp_path, max_rollbacks=1, at_cap="warn"))
    assert not gate.passed
    assert "different" in gate.measured


def test_weights_that_are_nearly_restored_fail(tmp_path, monkeypatch):
    honest = _CheckpointConnector.restore_model

    def nearly(self: Any) -> None:
        honest(self)
        self.trainer.lightning_module.layer.bias.data.mul_(1 + 2**-23)

    monkeypatch.setattr(_CheckpointConnector, "restore_model", nearly)
    gate = spike_gate(train(tmp_path))
    assert not gate.passed
    assert "weights different" in gate.measured


@pytest.mark.parametrize("kind", ["rollback", "step"])
def test_a_poisoned_checkpoint_that_stays_fails(tmp_path, monkeypatch, kind):
    honest = Strategy.remove_checkpoint

    def remove(self: Any, path: Path) -> None:
        if path.name != f"{kind}_{SPIKE_AT:06d}.ckpt":
            honest(self, path)

    monkeypatch.setattr(Strategy, "remove_checkpoint", remove)
    gate = spike_gate(train(tmp_path))
    assert not gate.passed
    assert "1 later checkpoints left" in gate.measured


def changed(run: SpikeRun, column: str, value: float, *, rows: int) -> SpikeRun:
    table = run.table.copy()
    table.iloc[-rows:, table.columns.get_loc(column)] = value
    return run._replace(table=table)


def test_training_that_ends_unhealthy_fails(sound):
    before = float(sound.undone["loss"].iloc[SPIKE_AT - EVERY : SPIKE_AT].mean())
    assert spike_gate(changed(sound, "loss", 1.04 * before, rows=EVERY)).passed
    for broken in (
        changed(sound, "loss", 1.06 * before, rows=EVERY),
        changed(sound, "total_loss", float("nan"), rows=1),
        changed(sound, "rollback_count", 2.0, rows=1),
        sound._replace(table=sound.table.iloc[:-1]),
        sound._replace(table=sound.table.drop(index=50)),
    ):
        assert not spike_gate(broken).passed


def test_the_poisoned_step_is_no_target_even_where_all_else_is_well(sound):
    visits = list(sound.visits)
    place = next(number for number, visit in enumerate(visits) if visit.step == SPIKE_AT)
    visits[place + 1] = visits[place]._replace(saved=visits[place].weights)
    assert not spike_gate(sound._replace(visits=visits)).passed


def test_a_loss_that_is_not_a_number_is_a_spike_and_no_rise_is_none(sound):
    late = sound.undone["step"] > SPIKE_AT
    for delta, passes in ((float("nan"), True), (0.3, True), (-0.1, False)):
        undone = sound.undone.assign(ppl_delta=sound.undone["ppl_delta"].where(~late, delta))
        assert spike_gate(sound._replace(undone=undone)).passed == passes


def test_a_spike_behind_no_checkpoint_proves_nothing(sound):
    visits = [visit._replace(files=visit.files - {f"rollback_{SPIKE_AT:06d}.ckpt"}) for visit in sound.visits]
    gate = spike_gate(sound._replace(visits=visits))
    assert not gate.passed
    assert f"no checkpoint of the ruined step {SPIKE_AT}" in gate.measured


def test_a_checkpoint_that_differs_from_what_was_trained_fails(sound):
    visits = [visit._replace(saved=visit.saved and "another") for visit in sound.visits]
    assert not spike_gate(sound._replace(visits=visits)).passed
    first = next(number for number, visit in enumerate(sound.visits) if visit.step == SPIKE_AT - EVERY)
    visits = list(sound.visits)
    visits[first] = visits[first]._replace(weights="another")
    assert not spike_gate(sound._replace(visits=visits)).passed


def test_digests_tell_tensors_apart():
    weights = {"b": torch.zeros(2), "a": [torch.ones(3), 1.5]}
    same = {"a": [torch.ones(3), 1.5], "b": torch.zeros(2)}
    assert digest(weights) == digest(same)
    others: list[Any] = [
        {"b": torch.zeros(2), "a": [torch.ones(3), 1.25]},
        {"b": torch.zeros(2), "a": [torch.ones(3)]},
        {"b": torch.tensor([0.0, -0.0]), "a": [torch.ones(3), 1.5]},
        {"b": torch.zeros(2, 1), "a": [torch.ones(3), 1.5]},
        {"b": torch.zeros(2).double(), "a": [torch.ones(3), 1.5]},
        {"c": torch.zeros(2), "a": [torch.ones(3), 1.5]},
    ]
    assert len({digest(weights), *map(digest, others)}) == 1 + len(others)
