"""What every benchmark says about where its figures come from, and how it fits growth."""

import itertools
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def provenance(module: str) -> str:
    """Markdown lines naming the command, the device, its threads and the versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    # the report says how to make it where it is kept, whichever directory this run writes to
    shown = [f"docs/results/{Path(b).name}" if a == "--out" else b for a, b in itertools.pairwise(sys.argv)]
    command = shlex.join(["python", "-m", module, *shown])
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    threads = f"{torch.get_num_threads()} CPU threads"
    return f"Command: `{command}`  \nDevice: {device}, {threads}  \nVersions: {versions}\n"


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope b of the least-squares line log(value) = a + b log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
