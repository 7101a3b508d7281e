"""Time and memory of attention through its second derivative, against PyTorch's kernels in the same run.

    python -m benchmarks.attention --out docs/results/attention.md

Measured are forward + backward, forward + backward + double backward, and the double backward alone: the
gradient of the gradients' inner product with random cotangents, by query, key, value and the output's
cotangent. Times are medians of CUDA events; memory is the allocator's peak beyond the inputs.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from benchmarks.attention_report import (
    BOTH,
    FIRST,
    LONG,
    SECOND,
    Case,
    Measurement,
    Results,
    draw_picture,
    first_calls,
    report,
)
from benchmarks.measure import cuda_milliseconds
from benchmarks.report import provenance
from theria.attention import backend_over, scaled_dot_product_attention
from theria.attention.triton_fused import TritonOperators

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic schedule where a kernel has one."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def peers(
    case: Case, work: str, precisions: Sequence[str]
) -> dict[str, tuple[Attention, Callable[[], AbstractContextManager[object]]]]:
    """Who can do the work, and in which context; theria in float32 in these precisions beside ieee."""
    native: Attention = partial(torch_attention, is_causal=case.causal)
    found: dict[str, tuple[Attention, Callable[[], AbstractContextManager[object]]]] = {
        "triton_fused": (theirs(case, "triton_fused"), nullcontext)
    }
    if case.dtype is torch.float32 and case.causal:
        for precision in precisions:
            backend = backend_over(TritonOperators(precision))
            attend = partial(
                backend,
                is_causal=True,
                window=None,
                causal_alignment="upper_left",
                scale=case.dim**-0.5,
                enable_gqa=False,
            )
            found[f"triton_fused, {precision}"] = attend, nullcontext
    if work == SECOND:
        return found
    found["custom"] = theirs(case, "custom"), nullcontext
    found["torch MATH"] = native, partial(sdpa_kernel, SDPBackend.MATH)
    if case.dtype is not torch.float32:
        found["torch MATH, half reduction"] = native, reduced_math
    found["explicit softmax"] = partial(explicit_softmax, causal=case.causal), nullcontext
    if work == FIRST:
        found["torch EFFICIENT"] = native, partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)
        if case.dtype is not torch.float32:
            found["torch FLASH"] = native, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
            found["torch FLASH, deterministic"] = native, deterministic_flash
    return found


def theirs(case: Case, backend: str) -> Attention:
    """A backend of theria."""
    return partial(scaled_dot_product_attention, is_causal=case.causal, backend=backend)


@contextmanager
def deterministic_flash() -> Iterator[None]:
    """PyTorch's FLASH kernel with a backward that repeats bit for bit."""
    with deterministic(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


def prepare(
    attention: Attention, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], work: str
) -> Callable[[], object]:
    """The work as a function to be timed."""
    query, key, value, out_cotangent = inputs

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        out = attention(query, key, value)
        return torch.autograd.grad(out, (query, key, value), out_cotangent, create_graph=create_graph)

    def curvature(first: tuple[Tensor, ...], retain_graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(first, tuple(inputs), tuple(cotangents), retain_graph=retain_graph)

    if work == FIRST:
        return lambda: gradients(False)
    if work == BOTH:
        return lambda: curvature(gradients(True), False)
    return partial(curvature, gradients(True), True)


def measure(attention: Attention, case: Case, work: str, *, seconds: float) -> Measurement:
    """Median time over about so many seconds, and the peak memory of one call."""
    torch.manual_seed(0)
    shape = (case.batch, case.heads, case.length, case.dim)

    def draw() -> Tensor:
        return torch.randn(shape, dtype=case.dtype, device="cuda")

    inputs = [draw().requires_grad_(i < 3 or work != FIRST) for i in range(4)]
    cotangents = [draw() for _ in range(3)]
    try:
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        call = prepare(attention, inputs, cotangents, work)
        call()
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        torch.cuda.reset_peak_memory_stats()
        once = cuda_milliseconds(call)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        repeats = max(2, min(50, int(1e3 * seconds / once)))
        times = [cuda_milliseconds(call) for _ in range(repeats)]
    except torch.cuda.OutOfMemoryError:
        return Measurement(failure="out of memory")
    except RuntimeError as error:
        return Measurement(failure=str(error).splitlines()[0][:60])
    finally:
        del inputs, cotangents
        torch.cuda.empty_cache()
    return Measurement(statistics.median(times), peak, first)


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


def main() -> None:
    """Measure everything, print the tables, write them and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--precisions", nargs="*", default=["bf16x6", "tf32x3", "fma"], help="beside ieee")
    parser.add_argument("--seconds", type=float, default=0.1, help="time spent on each row")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the picture goes beside it")
    args = parser.parse_args()
    dtypes = [getattr(torch, name) for name in args.dtypes]
    ceilings = {dtype: matmul_ceiling(dtype) for dtype in dtypes}
    results: Results = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an empty one: first calls compile
        planned = cases(args.lengths, args.dims, dtypes)
        for done, case in enumerate(planned, start=1):
            for work in (BOTH, SECOND, FIRST):
                for name, (attention, context) in peers(case, work, args.precisions).items():
                    with context():
                        found = measure(attention, case, work, seconds=args.seconds)
                    results[case, work, name] = found
                    print(case.length, case, work, name, found, flush=True)
            if args.out:  # after every size: a run that is cut short leaves what it has
                args.out.write_text(_text(results, ceilings, planned[done:]), encoding="utf-8")
                draw_picture(results, args.out.with_suffix(".png"))
    print(_text(results, ceilings, []))


def _text(results: Results, ceilings: dict[torch.dtype, float], missing: Sequence[Case]) -> str:
    shares = ", ".join(
        f"{str(d).removeprefix('torch.')} {value:.0f} TFLOP/s" for d, value in ceilings.items()
    )
    lines = [
        "# Attention through its second derivative",
        "",
        provenance("benchmarks.attention"),
        f"Measured matmul ceilings: {shares}. Each cell: median time (times that of triton_fused), peak",
        "memory beyond the inputs, and the share of the ceiling that the useful matrix products reach",
        "(forward 2, vjp 5, hvp 12; half if causal) [that theria's own products reach: 2, 7 and 20]. In",
        "float32 triton_fused takes exact products on the matrix units: the ceiling of plain float32 does",
        "not bound it. Exponents are fitted over the sizes of batch 4, of which small ones are bound by",
        f"launches, and that of a head's time (the time by batch and heads) over all sizes from N {LONG} on.",
        "",
        *first_calls(results),
        *([f"Cut short before {missing[0]}, N {missing[0].length}."] if missing else []),
        *report(results, ceilings),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
