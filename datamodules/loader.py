"""Loaders that shard themselves over ranks and resume at any batch.

A dataset here makes a whole batch from its `BatchIndex`, (epoch, ids), which the loader sends to it: with the
epoch in the index there is no state in a worker that could be stale. The loaders wrap a DataLoader rather
than subclass it, so that Lightning does not rebuild them around a sampler of its own.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset


class BatchIndex(NamedTuple):
    """Where a batch stands: the epoch and the ids of its items within the epoch."""

    epoch: int
    ids: range


@dataclasses.dataclass(frozen=True)
class Shard:
    """The ids one of W ranks takes from each global batch of consecutive ids: every W-th of them.

    All ranks together take every id once. Full batches split equally. Of a smaller last batch some ranks take
    one id fewer, and a rank left with none skips it, so lengths may differ by one over ranks: do not
    communicate batch by batch where `num_items` is not a multiple of `batch_size`.

    Attributes:
        num_items: ids of an epoch, over all ranks.
        batch_size: ids of a batch, over all ranks.
        rank: of this process.
        world_size: number of processes, W.

    Raises:
        ValueError: a size is below 1, batches do not divide over the ranks, or this rank has no item.
    """

    num_items: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_items", "batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size - 1}], got {self.rank}")
        if self.batch_size % self.world_size:
            raise ValueError(
                f"a global batch of {self.batch_size} does not divide over {self.world_size} ranks: "
                f"make it a multiple of {self.world_size}"
            )
        if self.num_items < self.world_size:
            raise ValueError(f"{self.num_items} items are too few to give {self.world_size} ranks one each")

    def __len__(self) -> int:
        """Batches of an epoch in which this rank has an item."""
        return -(-(self.num_items - self.rank) // self.batch_size)

    def ids(self, batch: int) -> range:
        """This rank's ids of the given global batch of an epoch."""
        first = batch * self.batch_size
        return range(first + self.rank, min(first + self.batch_size, self.num_items), self.world_size)


class BatchLoader:
    """The batches of epoch 0 in order, the same at every pass.

    Args:
        dataset: makes a batch from its index.
        shard: this rank's share.
        num_workers: processes that make batches; 0 makes them in this one.
        pin_memory: copy batches to page-locked memory, for transfer to a CUDA device.
    """

    def __init__(
        self, dataset: Dataset[Any], shard: Shard, *, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.dataset = dataset
        self.shard = shard
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[Any]:
        return self._read(BatchIndex(0, self.shard.ids(batch)) for batch in range(len(self)))

    def _read(self, indices: Iterable[BatchIndex]) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=indices,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Without its own, every pass would draw from the global generator and shift the training's draws.
            generator=torch.Generator(),
        )
        return iter(loader)


class ResumableLoader(BatchLoader):
    """An endless stream of batches, epoch after epoch, read `len(loader)` batches a pass.

    The position is one number, that of the next batch of the stream; what workers have prefetched does not
    count. Every pass goes on from the position, so the stream resumes exactly wherever it stopped; a
    position that is set in the middle of a pass is where the pass goes on. Its epochs are its own:
    Lightning's epoch number runs ahead after some restarts.

    Batches of the stream can be skipped, by their numbers: they are passed over as if they were not there,
    while all others stay what they are.

    Args:
        dataset: makes a batch from its index.
        shard: this rank's share; an epoch must consist of full batches.
        num_workers: processes that make batches; 0 makes them in this one.
        pin_memory: copy batches to page-locked memory, for transfer to a CUDA device.
        trainer: the Trainer whose training loop reads, if one does. A batch whose training step was
            interrupted then counts as not read, as in Lightning's own progress.

    Raises:
        ValueError: the number of items is not a multiple of the batch size.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        shard: Shard,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        trainer: Trainer | None = None,
    ) -> None:
        if shard.num_items % shard.batch_size:
            raise ValueError(
                f"an epoch must consist of full batches, got {shard.num_items} items "
                f"in batches of {shard.batch_size}"
            )
        super().__init__(dataset, shard, num_workers=num_workers, pin_memory=pin_memory)
        self.trainer = trainer
        self._position = 0
        self._last: int | None = None
        self._skipped: list[range] = []
        self._redirected = False
        self._processed_before_last: int | None = None

    def __iter__(self) -> Iterator[Any]:
        # A generator looks at the position when its first batch is asked for: Lightning makes iterators
        # that it never reads, and a position may be restored after one was made.
        left = len(self)
        while left:
            self._redirected = False
            # twice the same numbers: workers read ahead
            read, given = (itertools.islice(self._numbers(self._position), left) for _ in range(2))
            for number, batch in zip(given, self._read(map(self._index, read)), strict=True):
                left -= 1
                self._position, self._last = number + 1, number
                self._processed_before_last = self._processed()
                yield batch
                if self._redirected:
                    break

    @property
    def last_batch(self) -> int | None:
        """Number of the batch handed out last, by which it can be skipped; None before the first."""
        return self._last

    @property
    def skipped(self) -> list[range]:
        """The numbers of the batches that are skipped, ascending and without overlap."""
        return list(self._skipped)

    def skip(self, batches: range) -> None:
        """Pass over the batches of these consecutive numbers, wherever the stream comes to them.

        Raises:
            ValueError: the range has gaps or begins below 0.
        """
        if batches.step != 1 or batches.start < 0:
            raise ValueError(f"batches to skip are consecutive numbers from 0 on, got {batches}")
        self._skipped = _merged([*self._skipped, batches])
        self._redirected = True

    def state_dict(self) -> dict[str, Any]:
        """The position, the batches to skip, and the sizes they count in."""
        interrupted = (
            self.trainer is not None
            and self._last is not None
            and self._processed() == self._processed_before_last
        )
        return {
            "batches": self._last if interrupted else self._position,
            "num_items": self.shard.num_items,
            "batch_size": self.shard.batch_size,
            "skipped": [[batches.start, batches.stop] for batches in self._skipped],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position; one between two epochs may come from an epoch of other sizes.

        The batches skipped are then those of the state alone; with other sizes, where their numbers mean
        other items, none.

        Raises:
            ValueError: the position is in the middle of an epoch of other sizes, where it means other items.
        """
        saved = Shard(state_dict["num_items"], state_dict["batch_size"])
        same = (saved.num_items, saved.batch_size) == (self.shard.num_items, self.shard.batch_size)
        epoch, within = divmod(state_dict["batches"], len(saved))
        if within and not same:
            raise ValueError(
                f"the checkpoint stands {within} batches into an epoch of {saved.num_items} items in batches "
                f"of {saved.batch_size}, but this run has {self.shard.num_items} items in batches of "
                f"{self.shard.batch_size}: resume with the checkpoint's sizes, or from the end of an epoch"
            )
        self._position = epoch * len(self) + within
        # a state from before there was anything to skip has no such entry
        self._skipped = _merged(range(*pair) for pair in state_dict.get("skipped", [])) if same else []
        self._last = None
        self._redirected = True
        self._processed_before_last = None

    def _numbers(self, first: int) -> Iterator[int]:
        """Numbers of the batches from `first` on, without those to skip."""
        # `skip` replaces this list and never changes it, so that a reader keeps its own
        for batches in self._skipped:
            yield from range(first, batches.start)
            first = max(first, batches.stop)
        yield from itertools.count(first)

    def _index(self, number: int) -> BatchIndex:
        epoch, batch = divmod(number, len(self))
        return BatchIndex(epoch, self.shard.ids(batch))

    def _processed(self) -> int | None:
        """Batches the trainer has put through a training step, over all epochs."""
        if self.trainer is None:
            return None
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)


def _merged(ranges: Iterable[range]) -> list[range]:
    """The same numbers in ascending ranges that do not touch."""
    result: list[range] = []
    for batches in sorted((batches for batches in ranges if batches), key=lambda batches: batches.start):
        if result and batches.start <= result[-1].stop:
            result[-1] = range(result[-1].start, max(result[-1].stop, batches.stop))
        else:
            result.append(batches)
    return result
