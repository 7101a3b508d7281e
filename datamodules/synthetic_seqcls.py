"""The synthetic sequence-classification tasks of `theria.tasks` as a LightningDataModule."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loader import BatchIndex, BatchLoader, Shard
from datamodules.resumable import ResumableDataModule
from theria.cuda_graph import CapturedFunction
from theria.tasks.synthetic_seqcls import SeqClsSpec, Stream, TaskBatch, sample_tasks


class TaskRequest(NamedTuple):
    """Which tasks a batch holds, to be sampled where they are needed."""

    stream: Stream
    epoch: Tensor
    task_ids: Tensor


class TaskDataset(Dataset[TaskBatch | TaskRequest]):
    """Batches of task numbers, or of the tasks themselves.

    Args:
        spec: the shape of a task.
        seed: of the stream.
        stream: "train", "validation" or "test".
        num_tasks: tasks of an epoch.
        sample: make the tasks here, on the CPU, instead of handing on their numbers.
    """

    def __init__(self, spec: SeqClsSpec, *, seed: int, stream: Stream, num_tasks: int, sample: bool) -> None:
        self.spec = spec
        self.seed = seed
        self.stream = stream
        self.num_tasks = num_tasks
        self.sample = sample

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: BatchIndex) -> TaskBatch | TaskRequest:
        task_ids = torch.arange(index.ids.start, index.ids.stop, index.ids.step)
        request = TaskRequest(self.stream, torch.tensor(index.epoch), task_ids)
        return make_tasks(self.spec, self.seed, request) if self.sample else request


def make_tasks(spec: SeqClsSpec, seed: int, request: TaskRequest) -> TaskBatch:
    """The requested tasks, on the device of the request."""
    return sample_tasks(spec, request.task_ids, seed=seed, epoch=request.epoch, stream=request.stream)


class SyntheticSeqCls(ResumableDataModule):
    """Meta-batches of synthetic few-shot tasks; a module receives a `TaskBatch`.

    Every training epoch has new tasks, numbered from 0; validation and test tasks are the same at every pass.
    With `num_workers = 0` the loaders yield task numbers and the tasks are made on the training device; with
    workers these make them on the CPU, the same bit for bit where training is on the CPU too. The W ranks
    share every meta-batch, each taking every W-th task of it, so together they see the tasks that one process
    would see; Lightning's own distributed sampler never applies.

    Validation and test may end in a smaller batch, of which some ranks take one task fewer or none: log them
    per epoch, not per batch, when ranks synchronise.

    Args:
        length: positions in a sequence, at least 2.
        width: features of a position.
        num_classes: classes of a task, at least 2.
        num_signal_positions: positions that carry the class prototype, at most length - 1.
        noise: standard deviation of positions without signal; signal positions have half of it.
        support_size: sequences a task adapts on.
        query_size: sequences a task is judged on.
        meta_batch_size: tasks of a batch over all ranks; a multiple of their number.
        train_tasks_per_epoch: training tasks of an epoch, a multiple of meta_batch_size.
        val_tasks: validation tasks.
        test_tasks: test tasks.
        seed: of all tasks, in [0, 2^64).
        num_workers: processes that make tasks; 0 makes them on the training device.
        cuda_graph: on a CUDA device, make training tasks by replaying a CUDA graph. A batch is then
            overwritten by the next one.

    Raises:
        ValueError: a value is impossible; the message names it.
    """

    def __init__(
        self,
        length: int = 32,
        width: int = 64,
        num_classes: int = 5,
        num_signal_positions: int = 4,
        noise: float = 1.0,
        support_size: int = 16,
        query_size: int = 16,
        meta_batch_size: int = 16,
        train_tasks_per_epoch: int = 1600,
        val_tasks: int = 320,
        test_tasks: int = 640,
        seed: int = 0,
        num_workers: int = 0,
        cuda_graph: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["cuda_graph"])
        self.spec = SeqClsSpec(
            length=length,
            width=width,
            num_classes=num_classes,
            num_signal_positions=num_signal_positions,
            noise=noise,
            support_size=support_size,
            query_size=query_size,
        )
        for name, value, least, most in (
            ("meta_batch_size", meta_batch_size, 1, 2**32),
            ("train_tasks_per_epoch", train_tasks_per_epoch, 1, 2**32),
            ("val_tasks", val_tasks, 1, 2**32),
            ("test_tasks", test_tasks, 1, 2**32),
            ("seed", seed, 0, 2**64 - 1),
            ("num_workers", num_workers, 0, 2**16),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be in [{least}, {most}], got {value}")
        if train_tasks_per_epoch % meta_batch_size:
            raise ValueError(
                f"train_tasks_per_epoch = {train_tasks_per_epoch} is not a multiple of "
                f"meta_batch_size = {meta_batch_size}"
            )
        self.meta_batch_size = self.batch_size = meta_batch_size
        self.train_tasks_per_epoch = self.samples_per_epoch = train_tasks_per_epoch
        self.val_tasks = val_tasks
        self.test_tasks = test_tasks
        self.seed = seed
        self.num_workers = num_workers
        self.cuda_graph = cuda_graph
        self._captured: CapturedFunction[TaskBatch] | None = None

    def train_dataset(self) -> TaskDataset:
        """New tasks every epoch."""
        return self._dataset("train", self.train_tasks_per_epoch)

    def val_dataloader(self) -> BatchLoader:
        """The validation tasks, the same at every pass."""
        return self.evaluation_loader(self._dataset("validation", self.val_tasks), self.val_tasks)

    def test_dataloader(self) -> BatchLoader:
        """The test tasks, the same at every pass."""
        return self.evaluation_loader(self._dataset("test", self.test_tasks), self.test_tasks)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tasks for the numbers that came over; anything else passes."""
        if not isinstance(batch, TaskRequest):
            return batch
        if self.cuda_graph and batch.stream == "train" and batch.task_ids.is_cuda:
            tasks = self._replayed(batch)
        else:
            tasks = make_tasks(self.spec, self.seed, batch)
        # Lightning converts to the trainer's precision before the transfer, when there were no tasks yet.
        return tasks if self.trainer is None else self.trainer.precision_plugin.convert_input(tasks)

    def _replayed(self, request: TaskRequest) -> TaskBatch:
        inputs = (request.epoch, request.task_ids)
        if self._captured is None or not self._captured.fits(inputs):

            def make(epoch: Tensor, task_ids: Tensor) -> TaskBatch:
                return make_tasks(self.spec, self.seed, TaskRequest("train", epoch, task_ids))

            self._captured = CapturedFunction(make, inputs)
        return self._captured(*inputs)

    def settings(self) -> dict[str, Any]:
        """Those of the tasks, and how many there are of them."""
        return {
            **dataclasses.asdict(self.spec),
            "meta_batch_size": self.meta_batch_size,
            "train_tasks_per_epoch": self.train_tasks_per_epoch,
            "val_tasks": self.val_tasks,
            "test_tasks": self.test_tasks,
            "seed": self.seed,
        }

    def _dataset(self, stream: Stream, num_tasks: int) -> TaskDataset:
        return TaskDataset(
            self.spec, seed=self.seed, stream=stream, num_tasks=num_tasks, sample=self.num_workers > 0
        )

    def _shard(self, num_items: int) -> Shard:
        world_size = 1 if self.trainer is None else self.trainer.world_size
        if self.meta_batch_size % world_size:
            raise ValueError(
                f"meta_batch_size = {self.meta_batch_size} does not divide over {world_size} ranks: "
                f"make it a multiple of {world_size}"
            )
        return super()._shard(num_items)
