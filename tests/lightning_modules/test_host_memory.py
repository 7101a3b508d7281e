"""Freed tensors stay with the process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
torch.set_num_threads(1)
from lightning_modules.host_memory import keep_freed_memory
from theria.maml import meta_gradient
from theria.models.seq_classifier import SeqClassifier

model = SeqClassifier(64, 5, backend="reference")
support = torch.randn(16, 16, 32, 64), torch.randint(5, (16, 16))

def pages(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        meta_gradient(model, support, support, mode="FULL", inner_steps=3, inner_lr=0.4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages(2)
left = pages(3)
keep_freed_memory()
pages(4)
print(left, pages(3))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by other rules")
def test_a_meta_gradient_stops_faulting_pages_in():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    left, kept = map(int, run.stdout.split())
    assert left > 3000
    assert kept < left / 4
