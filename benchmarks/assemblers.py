"""What the float32 attention kernels compute by the assembler (ptxas) that made their machine code.

    python -m benchmarks.assemblers --ptxas PATH --out docs/results/assemblers.md

Triton's own assemblers and those that are named each assemble every operator at pairs of dim and value_dim,
in processes of their own, and the numbers are compared with the formulas in float64. An assembler that the
operators refuse is let through here.
"""

import argparse
import math
import os
import queue
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks.isolated import Isolated
from benchmarks.report import markdown_table, provenance
from theria.attention.custom import CustomOperators
from theria.attention.kernels import assembler
from theria.attention.operators import AttentionOperators, Band, Gradients
from theria.attention.triton_fused import TritonOperators

WIDTHS = (16, 32, 64, 128)
TOLERANCE = 1e-5
"""Relative error that rounding in float32 stays below, and a wrong operand does not."""


class Case(NamedTuple):
    """Batch, heads, key-value heads, queries, keys, dim, value_dim; whether it is causal; the arithmetic."""

    sizes: tuple[int, int, int, int, int, int, int]
    causal: bool
    precision: str


def cases() -> list[Case]:
    """All pairs of widths, and some that take other tiles or arithmetic."""
    square = [Case((1, 2, 2, 150, 150, e, v), True, "ieee") for e, v in product(WIDTHS, WIDTHS)]
    others = [(136, 136, "ieee"), (256, 32, "ieee"), (32, 256, "ieee"), (200, 256, "ieee")]
    others += [(16, 20, "bf16x6"), (64, 16, "bf16x6"), (64, 128, "bf16x6"), (64, 32, "tf32x3")]
    return square + [Case((1, 4, 2, 100, 133, e, v), False, precision) for e, v, precision in others]


def worst_error(case: Case) -> float:
    """The largest relative error of all operators' outputs, NaN counting as infinite."""
    batch, heads, kv_heads, queries, keys, dim, value_dim = case.sizes
    generator = torch.Generator("cuda").manual_seed(0)
    rows, columns = (batch, heads, queries), (batch, kv_heads, keys)
    shapes = [(*rows, dim), (*columns, dim), (*columns, value_dim)] * 2 + [(*rows, value_dim)]
    drawn = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    band = Band(dim**-0.5, causal=case.causal)
    found = _outputs(TritonOperators(case.precision), drawn, band)
    expected = _outputs(CustomOperators(), [t.double() for t in drawn], band)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return max(math.inf if math.isnan(error) else error for error in errors)


def _outputs(operators: AttentionOperators, drawn: Sequence[Tensor], band: Band) -> list[Tensor]:
    query, key, value, *tangents, cotangent = drawn
    directions = Gradients(*tangents)
    out, lse = operators.forward(query, key, value, band)
    primals = query, key, value, out, lse
    first = operators.vjp(*primals, cotangent, band)
    second = operators.hvp(*primals, cotangent, directions, band)
    moved = operators.jvp(*primals, directions, band)
    twice = operators.second_jvp(*primals, directions, Gradients(query, key, value), band)
    return [out, lse, moved, twice, *first, *second]


def errors_by(ptxas: str, chosen: Sequence[Case], lanes: int) -> dict[Case, float]:
    """The worst error of every case by an assembler, infinite where a launch faults."""
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in chosen:
        waiting.put(case)
    found: dict[Case, float] = {}

    def lane(cache: str) -> None:
        isolated = Isolated(partial(_use, ptxas, cache))
        while True:
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                return
            found[case] = isolated(partial(worst_error, case))

    with tempfile.TemporaryDirectory() as cache:
        threads = [threading.Thread(target=lane, args=(cache,)) for _ in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def _use(ptxas: str, cache: str) -> None:
    """Assemble with this ptxas in this process, sound or not."""
    os.environ["TRITON_PTXAS_PATH"], os.environ["TRITON_CACHE_DIR"] = ptxas, cache
    assembler.reason_against = lambda device: None


def report(found: dict[str, dict[Case, float]]) -> list[str]:
    """A row an assembler, and every case it gets wrong."""
    rows = []
    for name, errors in found.items():
        wrong = {case: error for case, error in errors.items() if error > TOLERANCE}
        right = [error for error in errors.values() if error <= TOLERANCE]
        listed = "; ".join(_described(case, error) for case, error in sorted(wrong.items()))
        worst = f"{max(right):.1e}" if right else ""
        rows.append([name, str(len(right)), str(len(wrong)), worst, listed])
    header = ["assembler", "right", "wrong", "largest error of the right", "the wrong: dim x value_dim"]
    return markdown_table(header, rows)


def _described(case: Case, error: float) -> str:
    said = "fault" if math.isinf(error) else f"error {error:.1g}"
    return f"{case.sizes[-2]} x {case.sizes[-1]} {case.precision} ({said})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the assemblers, print and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ptxas", nargs="*", default=[], help="further assemblers")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args(arguments)
    own = [triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell]
    tools = own + [triton.knobs.NvidiaTool.from_path(path) for path in args.ptxas]
    found = {f"ptxas {tool.version}": errors_by(tool.path, cases(), args.processes) for tool in tools}
    lines = ["# Numbers of the attention kernels by assembler", "", provenance("benchmarks.assemblers")]
    lines += [
        f"Triton {triton.__version__}; a case is right with every relative error below {TOLERANCE:g}.",
        "",
    ]
    lines += report(found)
    page = "\n".join(lines) + "\n"
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
