"""Time and peak memory of callables, taken in turns so that a noisy machine treats all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def seconds_in_turns(contenders: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each contender over ``rounds``, one call of each a round, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            _synchronize()
            started = time.perf_counter()
            call()
            _synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of tensors that a call holds at once beyond those alive before it.

    On CUDA, the allocator's peak; on a CPU, replayed from the profiler's record of allocations.
    """
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    roots = recorded.profiler.kineto_results.experimental_event_tree()
    held = peak = 0
    for _, size in sorted(_allocations(roots)):
        held += size
        peak = max(peak, held)
    return peak


def cuda_milliseconds(call: Callable[[], Any]) -> float:
    """Milliseconds of one call between two events of the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _allocations(events: list[Any]) -> list[tuple[int, int]]:
    found, pending = [], list(events)
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag.name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return found


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
