"""`theria` with one training task whose numbers are not finite, for test_rollback_in_runs.py.

    python faulty_runs.py TASK ARGUMENTS...

A program of its own, since Lightning starts every further process as this one was started.
"""

import sys
from typing import Any

import torch

import datamodules.synthetic_seqcls as data
from lightning_modules.cli import main


def spoil(task: int) -> None:
    """Let this task of epoch 0 have no number in it, whichever process makes it."""
    original = data.make_tasks

    def make_tasks(spec: Any, seed: int, request: Any) -> Any:
        tasks = original(spec, seed, request)
        bad = (request.task_ids == task) & (request.epoch == 0)
        if request.stream == "train" and bool(bad.any()):
            tasks.query_x[bad] = torch.nan
        return tasks

    data.make_tasks = make_tasks


if __name__ == "__main__":
    torch.set_num_threads(1)
    spoil(int(sys.argv[1]))
    main(sys.argv[2:])
