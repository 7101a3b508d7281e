"""Keep the C allocator from handing freed tensors back to the system between steps."""

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_NEVER_TRIM = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for its next step.

    An unrolled inner loop allocates and frees some hundred MiB of tensors every step. As it starts, glibc
    maps fresh pages for every block of 128 KiB and more and returns them when it is freed, so that a third
    of such a step's time on a CPU went into page faults. This raises both thresholds, see mallopt(3). With
    another allocator there is nothing to do, and nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
