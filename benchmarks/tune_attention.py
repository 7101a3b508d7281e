"""Find the tiles of `theria.attention.kernels.tiles.TUNED` on the CUDA device at hand.

    python -m benchmarks.tune_attention --arithmetics half ieee --widths 64 128 256

Every candidate of every kernel is compiled, several at a time, then launched as part of its operator, all
else equal, in processes of their own: one that faults is named and costs no more than itself. What needs
more shared memory than the device has is left out. Prints the entries of the table with the fastest
candidates, and the three fastest of each kernel with their times.
"""

import argparse
import concurrent.futures
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor

from benchmarks.isolated import Isolated, process_pool
from benchmarks.measure import cuda_milliseconds
from theria.attention.custom import CustomOperators
from theria.attention.kernels.tiles import TUNED, Tiles, generation
from theria.attention.operators import AttentionOperators, Band, Gradients
from theria.attention.triton_fused import PRECISIONS, TritonOperators

SMALL = {"length": 256, "heads": 1, "repeats": 1}
KERNELS = (
    "forward_rows",
    "vjp_rows",
    "vjp_columns",
    "jvp_rows",
    "hvp_rows",
    "hvp_columns",
    "second_jvp_rows",
)


def candidates(kernel: str, arithmetic: str, width: int) -> list[Tiles]:
    """Tiles worth trying: 8 to 64 scores a thread, half of that in float32, and operands that may fit.

    Exact products are taken in tiles of which a program owns at least 64 rows.
    """
    half = arithmetic == "half"
    least = 64 if arithmetic == "ieee" else 16
    sizes, stages, most = ((32, 64, 128), (1, 2, 3), 64) if half else ((16, 32, 64, 128), (1,), 32)
    return [
        Tiles(queries, keys, warps, depth)
        for queries, keys, warps, depth in product(sizes, sizes, (4, 8), stages)
        if 8 <= queries * keys / (32 * warps) <= most
        and (queries + keys) * width <= 256 * 128
        and (keys if kernel.endswith("_columns") else queries) >= least
    ]


def operator_call(
    operators: AttentionOperators, kernel: str, arithmetic: str, width: int, length: int, heads: int
) -> Callable[[], Sequence[Tensor]]:
    """The operator that launches the kernel, on random operands, causal."""
    dtype = torch.bfloat16 if arithmetic == "half" else torch.float32
    generator = torch.Generator("cuda").manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(1, heads, length, width, generator=generator, device="cuda").to(dtype)

    query, key, value, cotangent, *directions = (draw() for _ in range(10))
    tangents, others = Gradients(*directions[:3]), Gradients(*directions[3:])
    band = Band(width**-0.5, causal=True)
    if kernel == "forward_rows":
        return partial(operators.forward, query, key, value, band)
    primals = query, key, value, *CustomOperators().forward(query, key, value, band)
    if kernel.startswith("vjp"):
        return partial(operators.vjp, *primals, cotangent, band)
    if kernel.startswith("jvp"):
        return lambda: (operators.jvp(*primals, tangents, band),)
    if kernel.startswith("second_jvp"):
        return lambda: (operators.second_jvp(*primals, tangents, others, band),)
    return partial(operators.hvp, *primals, cotangent, tangents, band)


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
    """Median time of the operator that launches the kernel; infinite where tiles do not fit or compute wrong.

    What they compute is compared with the formulas at lengths that leave those room.
    """
    TUNED[generation(torch.device("cuda")), arithmetic, width] = tiles
    size = arithmetic, width, length, heads
    operators = TritonOperators("ieee" if arithmetic == "half" else arithmetic)
    try:
        call = operator_call(operators, kernel, *size)
        found = call()
        if length <= 512 and not agree(found, operator_call(CustomOperators(), kernel, *size)(), arithmetic):
            print(f"# wrong numbers: {kernel}, {arithmetic}, {width}, {tiles[kernel]}", flush=True)
            return float("inf")
        return statistics.median(cuda_milliseconds(call) for _ in range(repeats))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], arithmetic: str) -> bool:
    """Whether all outputs are the formulas' but for rounding; a NaN is not."""
    tolerance = {"half": 3e-2, "tf32": 2e-2}.get(arithmetic, 1e-4)
    return all(
        bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())
        for a, b in zip(found, expected, strict=True)
    )


def tune(
    arithmetic: str, width: int, kernels: Sequence[str], *, length: int, heads: int, processes: int
) -> dict[str, dict[Tiles, float]]:
    """By kernel, the milliseconds of each candidate that fits, the fastest first."""
    chosen = dict(TUNED.get((generation(torch.device("cuda")), arithmetic, width), {}))
    choices = {kernel: candidates(kernel, arithmetic, width) for kernel in kernels}
    with process_pool(processes) as pool:
        # small sizes, for the compiler's sake: what it makes lies in Triton's cache on disk afterwards
        jobs = [
            pool.submit(milliseconds, {**chosen, k: t}, k, arithmetic, width, **SMALL)
            for k in kernels
            for t in choices[k]
        ]
        concurrent.futures.wait(jobs)
    found: dict[str, dict[Tiles, float]] = {}
    isolated = Isolated()
    for kernel in kernels:
        size = {"length": length, "heads": heads, "repeats": 5}
        times = {}
        for t in choices[kernel]:
            trial = partial(milliseconds, {**chosen, kernel: t}, kernel, arithmetic, width)
            sound = isolated(partial(trial, **SMALL)) < float("inf")
            times[t] = isolated(partial(trial, **size)) if sound else float("inf")
        fitting = {t: ms for t, ms in times.items() if ms < float("inf")}
        found[kernel] = dict(sorted(fitting.items(), key=lambda item: item[1]))
        chosen[kernel] = next(iter(found[kernel]))
    return found


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
