"""`theria` with training tasks that break it, for test_rollback_in_runs.py.

    python faulty_runs.py FACTOR TASKS ARGUMENTS...

TASKS are numbers with commas between them, of tasks of epoch 0 whose query inputs are multiplied by FACTOR.

A program of its own, since Lightning starts every further process as this one was started.
"""

import sys
from typing import Any

import torch

import datamodules.synthetic_seqcls as data
from lightning_modules.cli import main


def spoil(factor: float, broken: list[int]) -> None:
    """Multiply the query inputs of these tasks of epoch 0, whichever process makes them."""
    original = data.make_tasks

    def make_tasks(spec: Any, seed: int, request: Any) -> Any:
        tasks = original(spec, seed, request)
        bad = torch.isin(request.task_ids, torch.tensor(broken)) & (request.epoch == 0)
        if request.stream == "train" and bool(bad.any()):
            tasks.query_x[bad] *= factor
        return tasks

    data.make_tasks = make_tasks


if __name__ == "__main__":
    torch.set_num_threads(1)
    spoil(float(sys.argv[1]), [int(task) for task in sys.argv[2].split(",")])
    main(sys.argv[3:])
