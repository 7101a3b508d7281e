"""Freed tensors stay with the process."""

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
torch.set_num_threads(1)
from lightning_modules.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    return [torch.empty(2**18).fill_(1.0) for _ in range(32)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by other rules")
def test_steps_stop_faulting_pages_in():
    pages_a_step = 32 * 2**20 // resource.getpagesize()
    assert faults("leave") > 5 * pages_a_step
    assert faults("keep") < pages_a_step
