"""What every benchmark says about where its figures come from, and how it fits growth."""

import importlib
import importlib.metadata
import itertools
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from theria.provenance import device_name


def provenance(module: str) -> str:
    """Markdown lines naming the command, the device, its threads and the versions."""
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    # the report says how to make it where it is kept, whichever directory this run writes to
    shown = [f"docs/results/{Path(b).name}" if a == "--out" else b for a, b in itertools.pairwise(sys.argv)]
    command = shlex.join(["python", "-m", module, *shown])
    packages = {
        "torch": torch.__version__,
        "Triton": _triton_version(),
        "flash-linear-attention": _version_of("flash-linear-attention"),
        "Python": platform.python_version(),
    }
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    threads = f"{torch.get_num_threads()} CPU threads"
    return f"Command: `{command}`  \nDevice: {device}, {threads}  \nVersions: {versions}\n"


def _triton_version() -> str | None:
    """Of the package that is imported, which may stand before the one that is installed."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope b of the least-squares line log(value) = a + b log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
