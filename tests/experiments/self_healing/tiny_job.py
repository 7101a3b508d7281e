"""A tiny job for the study's tests; called as a program it does the runs given, without run-time type checks.

    python tiny_job.py DIRECTORY FAULT...

Their files go into DIRECTORY. Two processes share the runs.
"""

import os
import sys
from pathlib import Path

from experiments.self_healing.jobs import JOBS, Job
from experiments.self_healing.runs import Run, perform, prepare_process

STEPS = 500
TINY = Job(
    "meta_seqcls.yaml",
    "tiny",
    "val/query_loss",
    model={
        "width": 8,
        "num_classes": 2,
        "inner_steps": 1,
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
        "lr_scheduler": {
            "class_path": "WarmupCosine",
            "init_args": {"warmup_steps": 10, "total_steps": STEPS, "final_share": 0.01},
        },
    },
    data={
        "width": 8,
        "num_classes": 2,
        "length": 6,
        "num_signal_positions": 2,
        "noise": 0.5,
        "support_size": 4,
        "query_size": 8,
    },
)


def run_of(fault: str) -> Run:
    """The one run of a fault."""
    return Run("tiny", fault, 0, STEPS, "cpu")


if __name__ == "__main__":
    JOBS["tiny"] = TINY
    prepare_process()
    directory, *faults = sys.argv[1:]
    child = os.fork()
    for fault in faults[child == 0 :: 2]:
        perform(run_of(fault), Path(directory))
    if child == 0:
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
