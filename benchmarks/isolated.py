"""Work in processes of its own, so that a launch that faults costs no more than itself."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor


class Isolated:
    """Runs a function in another process, which is replaced when a launch has faulted in it.

    Args:
        start: called first in the process.
    """

    def __init__(self, start: Callable[[], None] | None = None) -> None:
        self._start = start
        self._pool = process_pool(1, start)

    def __call__(self, job: Callable[[], float]) -> float:
        """What the function returns; infinity where it faults."""
        try:
            return self._pool.submit(job).result()
        except (RuntimeError, BrokenExecutor) as error:
            print(f"# fault: {job}: {str(error).splitlines()[0]}", flush=True)
            self._pool.shutdown()
            self._pool = process_pool(1, self._start)
            return float("inf")


def process_pool(count: int | None, start: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """Processes that share nothing with this one, as CUDA wants them."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=start)
