"""Synthetic tasks, every number of which is a function of a seed and of its place alone."""

from theria.tasks.synthetic_seqcls import SeqClsSpec, TaskBatch, sample_tasks

__all__ = ["SeqClsSpec", "TaskBatch", "sample_tasks"]
