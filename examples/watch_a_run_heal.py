"""Break a training in the middle, and watch it go back and end well.

    python examples/watch_a_run_heal.py

`PPLDeltaRollback` works with any LightningModule that shows a loss, under a loader that can skip batches.
Here one batch in the middle is a hundred times too large.
"""

import logging
import tempfile
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from callbacks import PPLDeltaRollback, RNGState
from datamodules.loader import BatchIndex, ResumableLoader, Shard

BATCHES, SIZE = 400, 16
BROKEN = 250
"""Number of the batch that is broken, whenever it comes."""

Batch = tuple[Tensor, Tensor]


class Points(Dataset[Batch]):
    """Batches of points about a plane."""

    def __getitem__(self, index: BatchIndex) -> Batch:
        number = index.ids.start // SIZE
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(SIZE, 4, generator=generator)
        y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0]) + 0.3 * torch.randn(SIZE, generator=generator)
        return x * 100 if number == BROKEN else x, y


class Plane(LightningModule):
    """A linear map, and what its loss was."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Squared distance."""
        x, y = batch
        loss = (self.layer(x).squeeze(-1) - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.03)


def train(*, heal: bool) -> tuple[Plane, PPLDeltaRollback]:
    """Train past the broken batch, with or without a way back."""
    torch.manual_seed(0)
    module = Plane()
    healer = PPLDeltaRollback(every_n_steps=50, healthy_after=20, skip_window=2)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=BATCHES - 20,
            default_root_dir=directory,
            callbacks=[RNGState(), healer] if heal else [RNGState()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, ResumableLoader(Points(), Shard(BATCHES * SIZE, SIZE)))
    return module, healer


def main() -> tuple[float, float]:
    """Both trainings; the mean loss of their last 50 steps, healed and not."""
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec|training goes back")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    healed, healer = train(heal=True)
    for rollback in healer.history:
        print(f"step {rollback.step}: {rollback.fault.reason}; back to step {rollback.target}")
    hurt, _ = train(heal=False)
    ends = [sum(module.losses[-50:]) / 50 for module in (healed, hurt)]
    print(f"mean loss of the last 50 steps: {ends[0]:.3f} healed, {ends[1]:.3g} not")
    return ends[0], ends[1]


if __name__ == "__main__":
    main()
