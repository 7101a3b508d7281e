"""Shapes declared with jaxtyping are checked at run time in every test."""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from run_time_checks import check_at_run_time
from triton_interpreter import replace_language_once_a_launch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it has to stand before theria is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        replace_language_once_a_launch()

# Tensors are small here: a second thread costs more than it brings, above all beside another program.
torch.set_num_threads(1)

check_at_run_time("theria")


@pytest.fixture(autouse=True)
def _logging_left_alone() -> Iterator[None]:
    """Running a study makes Lightning's loggers quieter, which other tests read."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files go to processes whole and in this order: none of the long ones shall be the last.
    count = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -count[item.path]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
