"""When kernels are compiled: those of one call at the same time, those of later calls beforehand.

A kernel takes seconds, float32 ones most, and compiles outside of Python's lock. A process that ends waits
for the one set that is being compiled.
"""

import contextvars
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton

from theria.attention.kernels import assembler


class Job(NamedTuple):
    """A launch: the kernel, its grid, arguments and constants."""

    kernel: Any
    grid: tuple[int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


Jobs = dict[str, Job]
"""Launches by the kernels' names."""

MakeJobs = Callable[[], Jobs]

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_ready: set[tuple[Any, ...]] = set()
_underway: dict[tuple[Any, ...], Future[None]] = {}
# one at a time: each compiles its kernels in threads of its own
_background = ThreadPoolExecutor(1, thread_name_prefix="theria-compile")


def _start_over() -> None:
    """A forked process has none of its parent's threads."""
    global _lock, _background
    _lock, _background = threading.Lock(), ThreadPoolExecutor(1, thread_name_prefix="theria-compile")
    _underway.clear()


os.register_at_fork(after_in_child=_start_over)


def compiled(
    jobs: Jobs,
    dtype: torch.dtype,
    device: torch.device,
    *,
    following: MakeJobs | None = None,
    later: MakeJobs | None = None,
) -> None:
    """Return once the kernels of ``jobs`` are compiled and loaded on the device.

    Those of ``following``, which the next call needs, are compiled along with them; those of ``later`` go on
    compiling in the background, and the call that needs them waits for them.
    """
    key = _key(jobs, dtype, device, following is not None)
    # when the main thread has ended no thread can be started, and each kernel compiles at its launch
    if key in _ready or not threading.main_thread().is_alive():
        return
    with _lock:
        if key in _ready:
            return
        assembler.install(device)
        underway = _underway.pop(key, None)
        if underway is None and later is not None:
            _begin(later(), dtype, device)
        if underway is not None and (error := underway.exception()) is not None:
            _logger.info("compiling in the background failed, so it is done again: %s", error)
        # what has been compiled is found again, and has to be loaded
        compile_together({**jobs, **({} if following is None else following())}, device)
        _ready.add(key)


def compile_together(jobs: Jobs, device: torch.device, *, load: bool = True) -> None:
    """Compile kernels at the same time, and load them.

    Loading is left out in the background, where it could meet a capture of a CUDA graph.
    """

    def warm_up() -> list[Any]:
        return [job.kernel.warmup(*job.arguments, grid=job.grid, **job.constants) for job in jobs.values()]

    def to_device(kernel: Any) -> None:
        with on_device(device):
            kernel.run  # noqa: B018 - the property loads it

    with on_device(device), ThreadPoolExecutor(len(jobs)) as threads:

        def compile_in_threads() -> None:
            with triton.AsyncCompileMode(threads):
                warm_up()

        # the mode outlives an error in its context, where every later compilation would meet it
        contextvars.copy_context().run(compile_in_threads)
        kernels = warm_up()
        if load:
            list(threads.map(to_device, kernels))


def on_device(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """A context in which a CUDA device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _begin(jobs: Jobs, dtype: torch.dtype, device: torch.device) -> None:
    key = _key(jobs, dtype, device, False)
    if jobs and key not in _ready and key not in _underway:
        _underway[key] = _background.submit(compile_together, jobs, device, load=False)


def _key(jobs: Jobs, dtype: torch.dtype, device: torch.device, trained: bool) -> tuple[Any, ...]:
    """What kernels are compiled for, but for how strides are aligned, which is left to the launch."""
    constants = ((name, *job.constants.values()) for name, job in jobs.items())
    return dtype, device, trained, *constants
