"""What `benchmarks.attention` measures, as tables and pictures."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks.report import fitted_exponent, markdown_table

FIRST = "forward + backward"
BOTH = "forward + backward + double backward"
SECOND = "double backward alone"

USEFUL_MATMULS = {FIRST: 2 + 5, BOTH: 2 + 5 + 12, SECOND: 12}
"""Fewest matrix products that a pair of tiles needs: forward 2, vjp 5, hvp 12."""

OWN_MATMULS = {FIRST: 2 + 7, BOTH: 2 + 7 + 20, SECOND: 20}
"""Those that theria's kernels take, which compute scores once more in each visit of a tile."""

LONG = 4096
"""Length from which the arithmetic and not the launches take the time."""


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
    """Milliseconds, peak MiB and the seconds of the very first call, or why there are none."""

    milliseconds: float = float("nan")
    mebibytes: float = float("nan")
    first_seconds: float = float("nan")
    failure: str = ""


Results = dict[tuple[Case, str, str], Measurement]
"""By case, work, and who did it."""


def report(results: Results, ceilings: dict[torch.dtype, float]) -> list[str]:
    """One table for each work and kind of case, every row a ratio to theria's fused kernels."""
    lines: list[str] = []
    for work in (BOTH, SECOND, FIRST):
        kinds = dict.fromkeys(_kind(case) for case, done, _ in results if done == work)
        for kind in kinds:
            mine = {key: m for key, m in results.items() if key[1] == work and _kind(key[0]) == kind}
            first = next(iter(mine))[0]
            lines += ["", f"## {work}: {str(first).split(', ', 1)[1]}", ""]
            lines += _table(mine, work, ceilings[first.dtype])
    return lines


def first_calls(results: Results) -> list[str]:
    """Seconds of the first call of everything of each kind, which compiles all kernels."""
    seconds: dict[str, float] = {}
    for (case, work, name), found in results.items():
        if work == BOTH and name.startswith("triton_fused") and not found.failure:
            seconds.setdefault(f"{name}: {str(case).split(', ', 1)[1]}", found.first_seconds)
    listed = (f"{who} {value:.1f} s" for who, value in seconds.items())
    return [f"First call of {BOTH}, compiling included: {'; '.join(listed)}."]


def _kind(case: Case) -> tuple[int, torch.dtype, bool]:
    return case.dim, case.dtype, case.causal


def _table(mine: Results, work: str, ceiling: float) -> list[str]:
    lengths = list(dict.fromkeys(case for case, _, _ in mine))
    rows = []
    for name in dict.fromkeys(name for _, _, name in mine):
        found = {case: m for case in lengths if (m := mine.get((case, work, name))) is not None}
        cells = [
            _cell(name, case, work, found[case], mine[case, work, "triton_fused"], ceiling)
            if case in found
            else ""
            for case in lengths
        ]
        done = [(case.length, m) for case, m in found.items() if not m.failure and case.batch == 4]
        exponents = ["", "", ""]
        if len(done) > 1:
            sizes = [length for length, _ in done]
            exponents = [
                f"{fitted_exponent(sizes, [m.milliseconds for _, m in done]):.2f}",
                "",
                f"{fitted_exponent(sizes, [m.mebibytes for _, m in done]):.2f}",
            ]
        far = {c: m.milliseconds for c, m in found.items() if not m.failure and c.length >= LONG}
        if len(far) > 1:
            of_a_head = [ms / (c.batch * c.heads) for c, ms in far.items()]
            exponents[1] = f"{fitted_exponent([c.length for c in far], of_a_head):.2f}"
        rows.append([name, *cells, *exponents])
    header = [f"N {case.length} ({case.batch}x{case.heads})" for case in lengths]
    far_title = f"a head's time ~ N^ from {LONG}"
    return markdown_table(["", *header, "time ~ N^", far_title, "memory ~ N^"], rows)


def _cell(name: str, case: Case, work: str, found: Measurement, fused: Measurement, ceiling: float) -> str:
    if found.failure:
        return found.failure
    ratio = "" if fused.failure else f" ({found.milliseconds / fused.milliseconds:.2f}x)"
    rate = case.flops(1) / found.milliseconds / 1e9 / ceiling
    share = f"{USEFUL_MATMULS[work] * rate:.0%}"
    if name.startswith("triton_fused"):
        share += f" [{OWN_MATMULS[work] * rate:.0%}]"
    return f"{found.milliseconds:.2f} ms{ratio}, {found.mebibytes:.0f} MiB, {share}"


def draw_picture(results: Results, path: Path) -> None:
    """Time and memory against length, all logarithmic: everything, causal, E 64, a row of panels a dtype."""
    dtypes = list(dict.fromkeys(case.dtype for case, _, _ in results))
    figure, axes = plt.subplots(
        len(dtypes), 2, figsize=(10, 4 * len(dtypes)), layout="constrained", squeeze=False
    )
    styles = {
        "triton_fused": "o-",
        "custom": "s--",
        "explicit softmax": "v:",
        "torch MATH": "D-.",
        "torch MATH, half reduction": "^-.",
    }
    for dtype, (time, memory) in zip(dtypes, axes, strict=True):
        for name, style in styles.items():
            points = [
                (case.length, m.milliseconds, m.mebibytes)
                for (case, work, who), m in results.items()
                if (work, who) == (BOTH, name) and _kind(case) == (64, dtype, True) and case.batch == 4
                if not m.failure
            ]
            if points:
                lengths, times, peaks = zip(*points, strict=True)
                time.loglog(lengths, times, style, label=name)
                memory.loglog(lengths, peaks, style, label=name)
        precision = str(dtype).removeprefix("torch.")
        time.set(xlabel="length N", ylabel="milliseconds", title=f"{BOTH}, {precision}")
        memory.set(xlabel="length N", ylabel="peak MiB", title=f"memory beyond the inputs, {precision}")
        time.legend()
        for axis in (time, memory):
            ticks = sorted({case.length for case, _, _ in results if case.batch == 4})
            axis.set_xticks(ticks, [str(length) for length in ticks])
            axis.set_xticks([], minor=True)
            axis.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
