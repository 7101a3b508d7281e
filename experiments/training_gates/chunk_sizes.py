"""Which chunk sizes the memory may take, and which it takes: agreement first, then speed."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import peak_bytes, seconds_in_turns
from benchmarks.report import markdown_table, provenance
from theria.memory import AssociativeMemory, PersistentMemory, QKProjection, resolve_kernel

CANDIDATES = (8, 16, 32, 64)
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Largest relative difference from float64 tensor operations; on CUDA of bfloat16 products."""

BATCH = {"cpu": 1, "cuda": 16}
HEADS = 2


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One chunk size on one device.

    Attributes:
        chunk_size: tokens computed together.
        kernel: that "auto" takes.
        seconds: of forward and backward, the median.
        peak_bytes: held at once beyond the inputs.
        difference: of what is read, relative to the reference.
    """

    chunk_size: int
    kernel: str
    seconds: float
    peak_bytes: int
    difference: float


def measure(device: str, *, length: int, dim: int, rounds: int) -> list[Measurement]:
    """Forward and backward of projection and delta memory at every candidate, in turns."""
    inputs = _inputs(device, length, dim)
    exact = (part.detach().double() for part in inputs)
    reference = _read(*exact, chunk_size=64, kernel="tensor", half=False).detach()
    calls: dict[int, Callable[[], Tensor]] = {
        chunk: partial(_step, *inputs, chunk_size=chunk, half=device == "cuda") for chunk in CANDIDATES
    }
    seconds = seconds_in_turns({str(chunk): call for chunk, call in calls.items()}, rounds=rounds)
    found = []
    for chunk, call in calls.items():
        read = call().detach().double()
        with _precision(inputs[0], device == "cuda"):
            kernel = resolve_kernel(inputs[0], inputs[1], chunk_size=chunk)
        difference = float((read - reference).norm() / reference.norm())
        found.append(Measurement(chunk, kernel, seconds[str(chunk)], peak_bytes(call), difference))
    return found


def locked_set(measurements: Sequence[Measurement], tolerance: float) -> tuple[int, ...]:
    """Chunk sizes that read what the reference reads."""
    return tuple(m.chunk_size for m in measurements if m.difference <= tolerance)


def default_of(measurements: Sequence[Measurement], locked: Sequence[int]) -> int:
    """The fastest of the locked set.

    Raises:
        ValueError: the set is empty.
    """
    if not locked:
        raise ValueError("no chunk size agrees with the reference, so there is none to choose")
    return min((m for m in measurements if m.chunk_size in locked), key=lambda m: m.seconds).chunk_size


def report(devices: Sequence[str], *, length: int, dim: int, rounds: int) -> str:
    """The page: a table, the locked set and the default of every device."""
    lines = ["# Chunk size of the memory", "", provenance("experiments.training_gates")]
    lines += [
        f"Forward and backward of the Q-K projection and the delta memory over shards of {length} tokens, "
        f"{HEADS} heads of width {dim}; float32 on the CPU, autocast to bfloat16 on CUDA. The difference is "
        "that of everything read from tensor operations in float64. The locked set are the candidates within "
        "the tolerance; the default is the fastest of them.",
        "",
    ]
    for device in devices:
        lines += [*_section(device, measure(device, length=length, dim=dim, rounds=rounds), length), ""]
    return "\n".join(lines)


def _section(device: str, measurements: Sequence[Measurement], length: int) -> list[str]:
    locked = locked_set(measurements, TOLERANCE[device])
    tokens = BATCH[device] * length
    rows = [
        [
            str(m.chunk_size),
            m.kernel,
            f"{1e3 * m.seconds:.1f}",
            f"{tokens / m.seconds:,.0f}",
            f"{m.peak_bytes / 2**20:.0f}",
            f"{m.difference:.1e}",
        ]
        for m in measurements
    ]
    header = ["chunk", "kernel", "ms", "tokens a second", "peak MiB", "relative difference"]
    name = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    return [
        f"## {name}, {BATCH[device]} sequence{'s' if BATCH[device] > 1 else ''}",
        "",
        *markdown_table(header, rows),
        "",
        f"Tolerance {TOLERANCE[device]:g}. Locked set: {{{', '.join(map(str, locked))}}}. "
        f"Default: **{default_of(measurements, locked)}**.",
    ]


def _inputs(device: str, length: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit queries and keys, values and strengths of writes, that require gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH[device], HEADS, length, dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    unit = (torch.nn.functional.normalize(part, dim=-1) for part in (q, k))
    beta = torch.rand(shape[:3], generator=generator)
    q, k, v, beta = (part.to(device).requires_grad_() for part in (*unit, v, beta))
    return q, k, v, beta


def _read(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, chunk_size: int, kernel: str = "auto", half: bool
) -> Tensor:
    torch.manual_seed(0)
    persistent = PersistentMemory(HEADS, q.shape[-1]).to(q)
    with _precision(q, half):
        projected, _ = QKProjection(persistent, chunk_size=chunk_size, kernel=kernel).to(q)(q, k)
        read, _ = AssociativeMemory("delta", chunk_size=chunk_size, kernel=kernel)(projected, k, v, beta=beta)
    return read


def _step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, chunk_size: int, half: bool) -> Tensor:
    read = _read(q, k, v, beta, chunk_size=chunk_size, half=half)
    torch.autograd.grad(read.float().square().sum(), (q, k, v, beta))
    return read


def _precision(tensor: Tensor, half: bool) -> torch.autocast:
    return torch.autocast(tensor.device.type, dtype=torch.bfloat16, enabled=half)
