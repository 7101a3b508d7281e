"""What data modules with a resumable training stream have in common."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset

from datamodules.loader import BatchLoader, ResumableLoader, Shard


class ResumableDataModule(LightningDataModule):
    """A data module whose training stream is counted, so that it goes on exactly where a checkpoint stands.

    Subclasses set `batch_size`, `samples_per_epoch` and `num_workers`, and give `settings` and
    `train_dataset`.
    """

    batch_size: int
    samples_per_epoch: int
    num_workers: int

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: ResumableLoader | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values that determine the samples; a resume warns of those that changed."""
        raise NotImplementedError

    def train_dataset(self) -> Dataset[Any]:
        """Makes a training batch from its `BatchIndex`."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Start the training stream; a Trainer that fits again goes on with it.

        Raises:
            ValueError: the batch does not divide over the ranks, or overfit_batches is set.
        """
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        overfit_batches = getattr(trainer, "overfit_batches", 0)
        if overfit_batches:
            raise ValueError(
                f"overfit_batches must be 0, got {overfit_batches}: "
                "every pass over the training data has new samples, there is nothing to overfit"
            )
        if self._train_loader is None or self._train_loader.trainer is not trainer:
            self._train_loader = self._new_train_loader()

    def train_dataloader(self) -> ResumableLoader:
        """New samples every epoch; resumable at any batch."""
        if self._train_loader is None:
            self._train_loader = self._new_train_loader()
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The settings that determine the samples, and the position in the training stream."""
        position = None if self._train_loader is None else self._train_loader.state_dict()
        return {"settings": self.settings(), "position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the training stream, and warn when it goes on with other settings.

        Lightning restores a loader's state only where it takes up an unfinished epoch; this is called always.

        Raises:
            ValueError: the checkpoint stands in the middle of an epoch, of other sizes than this run's.
        """
        if self.trainer is not None and not self.trainer.training:
            return
        saved = state_dict["settings"]
        changed = [
            f"{name} = {saved.get(name)!r} (now {value!r})"
            for name, value in self.settings().items()
            if saved.get(name) != value
        ]
        if changed:
            rank_zero_warn(
                f"The checkpoint was trained with {', '.join(changed)}: "
                "from here on the samples are those of this run's settings."
            )
        if state_dict["position"] is not None:
            self.train_dataloader().load_state_dict(state_dict["position"])

    def evaluation_loader(self, dataset: Dataset[Any], num_items: int) -> BatchLoader:
        """A loader of the items 0 .. num_items - 1, the same at every pass."""
        return BatchLoader(dataset, self._shard(num_items), **self._worker_options)

    def _new_train_loader(self) -> ResumableLoader:
        return ResumableLoader(
            self.train_dataset(),
            self._shard(self.samples_per_epoch),
            trainer=self.trainer,
            **self._worker_options,
        )

    @property
    def _worker_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.num_workers > 0 and torch.cuda.is_available(),
        }

    def _shard(self, num_items: int) -> Shard:
        trainer = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return Shard(num_items, self.batch_size, rank=rank, world_size=world_size)
