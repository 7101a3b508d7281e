"""Shapes declared with jaxtyping are checked at run time in every test."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it has to stand before theria is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors are small here: a second thread costs more than it brings, above all beside another program.
torch.set_num_threads(1)

install_import_hook("theria", "beartype.beartype")

# Modules whose tests share runs that take long: with --dist loadgroup one process does them, once.
SHARED_RUNS = (
    "callbacks/test_interference_heatmap",
    "callbacks/test_niah_probe",
    "experiments/interference/test_main",
    "experiments/interference/test_study",
    "experiments/self_healing/test_study",
    "experiments/training_gates/test_forced_spike",
    "experiments/training_gates/test_needle_recall",
    "lightning_modules/test_memory_lm_resume",
    "lightning_modules/test_memory_lm_rollback",
    "lightning_modules/test_resume",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = str(item.path.with_suffix("").relative_to(Path(__file__).parent))
        if module in SHARED_RUNS:
            item.add_marker(pytest.mark.xdist_group(module))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
