"""Time and memory of attention through its second derivative, against PyTorch's kernels in the same run.

    python -m benchmarks.attention --out docs/results/attention.md

One row is forward + backward, or forward + backward + double backward: the gradient of the gradients' inner
product with random cotangents, by query, key, value and the output's cotangent. Times are medians of CUDA
events; memory is the allocator's peak beyond the inputs.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from benchmarks.measure import cuda_milliseconds
from benchmarks.report import fitted_exponent, markdown_table, provenance
from theria.attention import available_backends, scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

USEFUL_MATMULS = {1: 2 + 5, 2: 2 + 5 + 12}
"""Fewest matrix products a pair of tiles needs, by order: forward 2, vjp 5, hvp 12."""


@dataclass(frozen=True)
class Case:
    """One size."""

    batch: int
    heads: int
    length: int
    dim: int
    dtype: torch.dtype
    causal: bool

    def flops(self, matmuls: int) -> float:
        """Floating-point operations of so many products of (length, dim) by (dim, length)."""
        pairs = self.batch * self.heads * self.length**2 * (0.5 if self.causal else 1.0)
        return 2.0 * matmuls * pairs * self.dim

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.batch}x{self.heads}, E {self.dim}, {str(self.dtype).removeprefix('torch.')}, {kind}"


@dataclass(frozen=True)
class Measurement:
    """Milliseconds and peak MiB, or why there are none."""

    milliseconds: float = float("nan")
    mebibytes: float = float("nan")
    failure: str = ""


def explicit_softmax(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """The textbook formula in the inputs' own precision."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ value


@contextmanager
def reduced_math() -> Iterator[None]:
    """PyTorch's MATH kernel in the inputs' own half precision instead of float32."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


def peers(case: Case, order: int) -> dict[str, tuple[Attention, Callable[[], object]]]:
    """Who can compute the case to this order, and the context each needs."""
    native: Attention = partial(torch_attention, is_causal=case.causal)
    found: dict[str, tuple[Attention, Callable[[], object]]] = {}
    for name in ("triton_fused", "custom"):
        if name in available_backends():
            found[name] = (
                partial(scaled_dot_product_attention, is_causal=case.causal, backend=name),
                nullcontext,
            )
    found["torch MATH"] = (native, partial(sdpa_kernel, SDPBackend.MATH))
    if case.dtype is not torch.float32:
        found["torch MATH, half reduction"] = (
            native,
            lambda: _both(reduced_math(), sdpa_kernel(SDPBackend.MATH)),
        )
        found["explicit softmax"] = (partial(explicit_softmax, causal=case.causal), nullcontext)
    if order == 1:
        found["torch EFFICIENT"] = (native, partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION))
        if case.dtype is not torch.float32:
            found["torch FLASH"] = (native, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION))
    return found


@contextmanager
def _both(first: object, second: object) -> Iterator[None]:
    with first, second:  # type: ignore[attr-defined]
        yield


def workload(
    attention: Attention, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], order: int
) -> object:
    """Forward and backward; with order 2 the backward of the backward too."""
    query, key, value, out_cotangent = inputs
    out = attention(query, key, value)
    gradients = torch.autograd.grad(out, (query, key, value), out_cotangent, create_graph=order == 2)
    if order == 1:
        return gradients
    return torch.autograd.grad(gradients, (query, key, value, out_cotangent), tuple(cotangents))


def measure(attention: Attention, case: Case, order: int, *, seconds: float) -> Measurement:
    """Median time over about so many seconds, and the peak memory of one call."""
    torch.manual_seed(0)
    shape = (case.batch, case.heads, case.length, case.dim)

    def draw() -> Tensor:
        return torch.randn(shape, dtype=case.dtype, device="cuda")

    inputs = [draw().requires_grad_(i < 3 or order == 2) for i in range(4)]
    cotangents = [draw() for _ in range(3)]
    call = partial(workload, attention, inputs, cotangents, order)
    try:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = [cuda_milliseconds(call)]
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        repeats = max(2, min(50, int(1e3 * seconds / times[0])))
        times = [cuda_milliseconds(call) for _ in range(repeats)]
    except torch.cuda.OutOfMemoryError:
        return Measurement(failure="out of memory")
    except RuntimeError as error:
        return Measurement(failure=str(error).splitlines()[0][:60])
    finally:
        del inputs, cotangents, call
        torch.cuda.empty_cache()
    return Measurement(statistics.median(times), peak)


def matmul_ceiling(dtype: torch.dtype) -> float:
    """Measured TFLOP/s of an 8192 cubed matrix product on random data."""
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / statistics.median(cuda_milliseconds(lambda: a @ b) for _ in range(10)) / 1e9


def cases(lengths: Sequence[int], dims: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Batch 4 x 16 heads up to 8192, fewer beyond."""
    found = []
    for dtype in dtypes:
        for dim in dims:
            for causal in (True, False):
                for length in lengths:
                    batch, heads = (4, 16) if length <= 8192 else (1, 16) if length <= 16384 else (1, 2)
                    found.append(Case(batch, heads, length, dim, dtype, causal))
    return found


def report(
    results: dict[tuple[Case, int, str], Measurement], ceilings: dict[torch.dtype, float]
) -> list[str]:
    """One table an order and a kind of case, every row a ratio to theria's fused kernels."""
    lines: list[str] = []
    for order, title in ((1, "forward + backward"), (2, "forward + backward + double backward")):
        kinds = dict.fromkeys((c.dim, c.dtype, c.causal) for c, o, _ in results if o == order)
        for dim, dtype, causal in kinds:
            mine = {k: m for k, m in results.items() if k[1] == order and _kind(k[0]) == (dim, dtype, causal)}
            first = next(iter(mine))[0]
            lines += ["", f"## {title}: {str(first).split(', ', 1)[1]}", ""]
            lines += _table(mine, order, ceilings[dtype])
    return lines


def _kind(case: Case) -> tuple[int, torch.dtype, bool]:
    return case.dim, case.dtype, case.causal


def _table(mine: dict[tuple[Case, int, str], Measurement], order: int, ceiling: float) -> list[str]:
    lengths = list(dict.fromkeys(case for case, _, _ in mine))
    rows = []
    for name in dict.fromkeys(name for _, _, name in mine):
        cells = []
        for case in lengths:
            found = mine.get((case, order, name))
            fused = mine.get((case, order, "triton_fused"))
            if found is None:
                cells.append("")
            elif found.failure:
                cells.append(found.failure)
            else:
                ratio = (
                    ""
                    if fused is None or fused.failure
                    else f" ({found.milliseconds / fused.milliseconds:.2f}x)"
                )
                share = case.flops(USEFUL_MATMULS[order]) / found.milliseconds / 1e9 / ceiling
                cells.append(f"{found.milliseconds:.2f} ms{ratio}, {found.mebibytes:.0f} MiB, {share:.0%}")
        done = [
            (c, m) for c in lengths if (m := mine.get((c, order, name))) and not m.failure and c.batch == 4
        ]
        exponents = ["", ""]
        if len(done) > 1:
            sizes = [c.length for c, _ in done]
            exponents = [
                f"{fitted_exponent(sizes, [m.milliseconds for _, m in done]):.2f}",
                f"{fitted_exponent(sizes, [m.mebibytes for _, m in done]):.2f}",
            ]
        rows.append([name, *cells, *exponents])
    header = [f"N {case.length} ({case.batch}x{case.heads})" for case in lengths]
    return markdown_table(["", *header, "time ~ N^", "memory ~ N^"], rows)


def draw_picture(results: dict[tuple[Case, int, str], Measurement], path: Path) -> None:
    """Time and memory against length, both logarithmic, of the double backward in bfloat16, causal, E 64."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = {"triton_fused": "o-", "custom": "s--", "explicit softmax": "v:", "torch MATH": "D-."}
    for name, style in styles.items():
        points = [
            (case.length, m)
            for (case, order, who), m in results.items()
            if (order, who) == (2, name) and _kind(case) == (64, torch.bfloat16, True) and case.batch == 4
            if not m.failure
        ]
        if points:
            lengths = [length for length, _ in points]
            axes[0].loglog(lengths, [m.milliseconds for _, m in points], style, label=name)
            axes[1].loglog(lengths, [m.mebibytes for _, m in points], style, label=name)
    axes[0].set(xlabel="length N", ylabel="milliseconds", title="forward + backward + double backward")
    axes[1].set(xlabel="length N", ylabel="peak MiB", title="memory beyond the inputs")
    axes[0].legend()
    for axis in axes:
        axis.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure everything, print the tables, write them and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each row")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the picture goes beside it")
    args = parser.parse_args()
    dtypes = [getattr(torch, name) for name in args.dtypes]
    ceilings = {dtype: matmul_ceiling(dtype) for dtype in dtypes}
    results: dict[tuple[Case, int, str], Measurement] = {}
    for case in cases(args.lengths, args.dims, dtypes):
        for order in (1, 2):
            for name, (attention, context) in peers(case, order).items():
                with context():  # type: ignore[attr-defined]
                    found = measure(attention, case, order, seconds=args.seconds)
                results[case, order, name] = found
                print(case.length, case, order, name, found, flush=True)
    shares = ", ".join(
        f"{str(d).removeprefix('torch.')} {value:.0f} TFLOP/s" for d, value in ceilings.items()
    )
    lines = [
        "# Attention through its second derivative",
        "",
        provenance("benchmarks.attention"),
        f"Measured matmul ceilings: {shares}. Each cell: median time (times that of triton_fused), peak",
        "memory beyond the inputs, and the share of the ceiling that the useful matrix products reach",
        "(2 + 5 + 12, half if causal).",
        *report(results, ceilings),
        "",
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines), encoding="utf-8")
        draw_picture(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
