"""Find the tiles of `theria.attention.kernels.tiles.TUNED` on the CUDA device at hand.

    python -m benchmarks.tune_attention --arithmetics half ieee --widths 64 128 256

Every candidate of every kernel is compiled, several at a time, then launched as part of its operator, all
else equal, in processes of their own: one that faults is named and costs no more than itself. What needs
more shared memory than the device has is left out. Prints the entries of the table with the fastest
candidates, and the three fastest of each kernel with their times.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor

from benchmarks.measure import cuda_milliseconds
from theria.attention.kernels.tiles import TUNED, Tiles, generation
from theria.attention.operators import Band, Gradients
from theria.attention.triton_fused import PRECISIONS, TritonOperators

KERNELS = ("forward_rows", "vjp_rows", "vjp_columns", "jvp_rows", "hvp_rows", "hvp_columns")


def candidates(arithmetic: str, width: int) -> list[Tiles]:
    """Tiles worth trying: 8 to 64 scores a thread, half of that in float32, and operands that may fit."""
    half = arithmetic == "half"
    sizes, stages, most = ((32, 64, 128), (1, 2, 3), 64) if half else ((16, 32, 64, 128), (1,), 32)
    return [
        Tiles(queries, keys, warps, depth)
        for queries, keys, warps, depth in product(sizes, sizes, (4, 8), stages)
        if 8 <= queries * keys / (32 * warps) <= most and (queries + keys) * width <= 256 * 128
    ]


def operator_call(kernel: str, arithmetic: str, width: int, length: int, heads: int) -> Callable[[], object]:
    """The operator that launches the kernel, on random operands, causal."""
    precision = "ieee" if arithmetic == "half" else arithmetic
    dtype = torch.bfloat16 if arithmetic == "half" else torch.float32
    generator = torch.Generator("cuda").manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(1, heads, length, width, generator=generator, device="cuda").to(dtype)

    query, key, value, cotangent, *directions = (draw() for _ in range(7))
    operators, band = TritonOperators(precision), Band(width**-0.5, causal=True)
    if kernel == "forward_rows":
        return partial(operators.forward, query, key, value, band)
    primals = query, key, value, draw(), torch.zeros(1, heads, length, device="cuda")
    if kernel.startswith("vjp"):
        return partial(operators.vjp, *primals, cotangent, band)
    if kernel.startswith("jvp"):
        return partial(operators.jvp, *primals, Gradients(*directions), band)
    return partial(operators.hvp, *primals, cotangent, Gradients(*directions), band)


def milliseconds(
    tiles: dict[str, Tiles],
    kernel: str,
    arithmetic: str,
    width: int,
    *,
    length: int,
    heads: int,
    repeats: int,
) -> float:
    """Median time of the operator that launches the kernel; infinite where the tiles do not fit."""
    TUNED[generation(torch.device("cuda")), arithmetic, width] = tiles
    try:
        call = operator_call(kernel, arithmetic, width, length, heads)
        call()
        return statistics.median(cuda_milliseconds(call) for _ in range(repeats))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def tune(
    arithmetic: str, width: int, kernels: Sequence[str], *, length: int, heads: int, processes: int
) -> dict[str, dict[Tiles, float]]:
    """By kernel, the milliseconds of each candidate that fits, the fastest first."""
    chosen = dict(TUNED.get((generation(torch.device("cuda")), arithmetic, width), {}))
    choices = candidates(arithmetic, width)
    with _processes(processes) as pool:
        # small sizes, for the compiler's sake: what it makes lies in Triton's cache on disk afterwards
        jobs = [
            pool.submit(milliseconds, {**chosen, k: t}, k, arithmetic, width, length=256, heads=1, repeats=1)
            for k, t in product(kernels, choices)
        ]
        concurrent.futures.wait(jobs)
    found: dict[str, dict[Tiles, float]] = {}
    isolated = _Isolated()
    for kernel in kernels:
        size = {"length": length, "heads": heads, "repeats": 5}
        times = {
            t: isolated(partial(milliseconds, {**chosen, kernel: t}, kernel, arithmetic, width, **size))
            for t in choices
        }
        fitting = {t: ms for t, ms in times.items() if ms < float("inf")}
        found[kernel] = dict(sorted(fitting.items(), key=lambda item: item[1]))
        chosen[kernel] = next(iter(found[kernel]))
    return found


class _Isolated:
    """Runs a function in a process of its own, which is replaced when a launch has faulted in it."""

    def __init__(self) -> None:
        self._pool = _processes(1)

    def __call__(self, job: Callable[[], float]) -> float:
        try:
            return self._pool.submit(job).result()
        except (RuntimeError, BrokenExecutor) as error:
            print(f"# fault: {job}: {str(error).splitlines()[0]}", flush=True)
            self._pool.shutdown()
            self._pool = _processes(1)
            return float("inf")


def _processes(count: int | None) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def report(device: str, arithmetic: str, width: int, found: dict[str, dict[Tiles, float]]) -> list[str]:
    """The entry of the table, and the fastest three of each kernel."""
    lines = [f'    ("{device}", "{arithmetic}", {width}): {{']
    for kernel, times in found.items():
        lines.append(f'        "{kernel}": Tiles({", ".join(map(str, next(iter(times))))}),')
    lines.append("    },")
    for kernel, times in found.items():
        fastest = ", ".join(f"{tuple(tiles)} {ms:.3f} ms" for tiles, ms in list(times.items())[:3])
        lines.append(f"# {kernel}: {fastest}; {len(times)} fit")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune what is asked for and print the entries."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arithmetics", nargs="+", choices=["half", *PRECISIONS], default=["half", "ieee"])
    parser.add_argument("--widths", type=int, nargs="+", choices=[64, 128, 256], default=[64, 128, 256])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    device = generation(torch.device("cuda"))
    for arithmetic, width in product(args.arithmetics, args.widths):
        found = tune(
            arithmetic,
            width,
            args.kernels,
            length=args.length,
            heads=args.heads,
            processes=args.processes,
        )
        print("\n".join(report(device, arithmetic, width, found)), flush=True)


if __name__ == "__main__":
    main()
