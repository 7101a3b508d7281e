"""Keep the C allocator from handing freed tensors back to the system between steps."""

import torch

_BLOCK_BYTES = 31 * 2**20


def keep_freed_memory() -> None:
    """Let the process keep the memory of freed tensors for the next step.

    glibc serves blocks of 128 KiB and more by mapping fresh pages, and trims the heap after they are freed,
    until it has seen a larger mapped block freed; then it moves both thresholds up, to 32 and 64 MiB at
    most (mallopt(3), M_MMAP_THRESHOLD). An unrolled inner loop allocates and frees some hundred MiB every
    step, and without this up to a third of its time on a CPU went into page faults. Elsewhere than on
    glibc the call changes nothing.
    """
    block = torch.empty(_BLOCK_BYTES, dtype=torch.uint8)
    del block
