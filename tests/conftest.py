"""Shapes declared with jaxtyping are checked at run time in every test."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it has to stand before theria is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors are small here: a second thread costs more than it brings, above all beside another program.
torch.set_num_threads(1)

install_import_hook("theria", "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
