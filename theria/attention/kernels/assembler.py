"""Which assembler turns the kernels into machine code for Hopper GPUs.

ptxas 12.8, which Triton up to 3.7 takes for Hopper, loses the upper halves of the addresses at which the
matrix units find their operands: on an H200 kernels of narrow heads gave wrong numbers or illegal addresses,
and the same PTX assembled by 12.9 or later did not. Before 13.3 it may also reuse a register that a matrix
unit still reads, as NVIDIA's release notes of CUDA 13.3 say. So the newest ptxas at hand is taken: of
Triton's own two, of which it keeps one for Blackwell, and of the package ``nvidia-cuda-nvcc``.
"""

import ctypes
import functools
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import triton
from triton.knobs import NvidiaTool

SOUND = (12, 9)
"""The first version whose code the tests have passed with."""
ADVISED = (13, 3)

_logger = logging.getLogger(__name__)


def install(device: torch.device) -> None:
    """Have Triton assemble with ``assembler()`` where the device is a Hopper GPU.

    The setting is Triton's, for the whole process: what other packages compile afterwards is assembled by the
    newer ptxas too. ``TRITON_PTXAS_PATH``, where it is set, is left alone.
    """
    if _is_hopper(device):
        _install_once()


def reason_against(device: torch.device) -> str | None:
    """Why no kernel can be assembled soundly for the device, or None."""
    if not _is_hopper(device) or _version(assembler()) >= SOUND:
        return None
    return (
        f"it supports Hopper GPUs with ptxas {_text(SOUND)} or later, since earlier ones assemble wrong "
        f"code, not {assembler().version} ({assembler().path}): pip install theria[hopper], or name one in "
        "TRITON_PTXAS_PATH"
    )


@functools.cache
def assembler() -> NvidiaTool:
    """The ptxas that assembles for Hopper: the user's, else the newest that the driver can load code of."""
    if os.environ.get("TRITON_PTXAS_PATH"):
        return triton.knobs.nvidia.ptxas
    return newest([*_bundled(), *_packaged()], driver_major())


def newest(tools: Iterable[NvidiaTool], driver: int) -> NvidiaTool:
    """The tool of the highest version that is not of a later major release than the driver's CUDA."""
    first, *others = tools
    fitting = [first, *(tool for tool in others if _version(tool)[0] <= driver)]
    return max(fitting, key=_version)


def driver_major() -> int:
    """Major version of CUDA that the installed driver supports; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value // 1000


@functools.cache
def _install_once() -> None:
    tool = assembler()
    triton.knobs.nvidia.ptxas = tool.path
    _logger.info("the attention kernels are assembled by ptxas %s (%s)", tool.version, tool.path)
    if SOUND <= _version(tool) < ADVISED:
        _logger.info("ptxas %s or later is advised for Hopper: pip install theria[hopper]", _text(ADVISED))


def _bundled() -> list[NvidiaTool]:
    """Triton's assemblers: for Hopper, and for Blackwell."""
    return [triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell]


def _packaged() -> Iterator[NvidiaTool]:
    """The assemblers of the pip packages nvidia-cuda-nvcc and nvidia-cuda-nvcc-cu12."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*/bin/ptxas")):
            tool = NvidiaTool.from_path(str(path))
            if tool is not None:
                yield tool


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    available = torch.cuda.is_available() and torch.version.hip is None
    return available and torch.cuda.get_device_capability(device)[0] == 9


def _version(tool: NvidiaTool) -> tuple[int, int]:
    major, minor = tool.version.split(".")
    return int(major), int(minor)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
