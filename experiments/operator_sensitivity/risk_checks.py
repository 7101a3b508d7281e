"""Checks of what the study rests on: determinism, parity of the backends, and resumption, with figures."""

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from callbacks import ResumableCheckpoint, RNGState
from experiments.operator_sensitivity.execute import execute
from experiments.operator_sensitivity.fit import fit, prepare_process, train
from experiments.operator_sensitivity.ledger import TIMINGS, Ledger, write_csv
from experiments.operator_sensitivity.options import add_execution, base_run, parser
from experiments.operator_sensitivity.report import risk_checks_csv, risk_checks_table
from experiments.operator_sensitivity.runs import Run, grid
from theria.attention import scaled_dot_product_attention
from theria.curvature import relative_difference
from theria.maml import meta_gradient
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

FORWARD_LIMIT, DERIVATIVE_LIMIT = 1e-5, 1e-4
"""Largest relative error of triton_fused that passes; ten times as much is a warning."""

_SMALL = SeqClsSpec(length=12, width=16, num_classes=2, num_signal_positions=2, support_size=2, query_size=2)


@dataclass(frozen=True)
class Check:
    """One figure, the limit it has to keep, and what it comes to."""

    name: str
    figure: float
    limit: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """PASS up to the limit, WARN up to ten times the limit, else FAIL; a limit of 0 means exactly."""
        if self.figure <= self.limit:
            return "PASS"
        return "WARN" if self.figure <= 10 * self.limit else "FAIL"


def maximum(values: Iterable[float]) -> float:
    """The largest number, or NaN if there is one; Python's own hides a NaN behind whatever came before."""
    return float(np.max(list(values)))


def determinism(run: Run) -> Iterator[Check]:
    """The same run twice, exactly."""
    (_, first), (_, second) = train(run), train(run)
    largest = maximum(float(np.abs(first[name] - second[name]).max()) for name in first)
    label = f"{run.backend}, {run.mode}, k={run.inner_steps}, {run.outer_steps} steps on {run.device}"
    yield Check("determinism: largest difference of any step's value", largest, 0.0, label)


def resumed_training(run: Run) -> Iterator[Check]:
    """A run stopped halfway and resumed from its checkpoint, against the uninterrupted one, exactly."""
    half = run.outer_steps // 2
    with tempfile.TemporaryDirectory() as directory:
        whole, rows = fit(run, run.backend, [RNGState()])
        checkpoint = ResumableCheckpoint(every_n_steps=half, dirpath=directory)
        fit(run, run.backend, [RNGState(), checkpoint], max_steps=half)
        again = ResumableCheckpoint(every_n_steps=half, dirpath=directory)
        resumed, later = fit(run, run.backend, [RNGState(), again], ckpt_path=checkpoint.last_model_path)
    apart = (
        (p - q).abs().max().item() for p, q in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    losses = (abs(a["loss"] - b["loss"]) for a, b in zip(rows[half:], later, strict=True))
    label = f"stopped at {half} of {run.outer_steps}, {run.backend} on {run.device}"
    yield Check("resumed training: largest difference of a final parameter", maximum(apart), 0.0, label)
    yield Check("resumed training: largest difference of a step's loss", maximum(losses), 0.0, label)


def resumed_grid(run: Run) -> Iterator[Check]:
    """A grid done in two calls, against one done at once: the same rows but for timings."""
    runs = grid(run, modes=("FULL", "FO"), inner_steps=(1, 2), seeds=(0,))
    with tempfile.TemporaryDirectory() as directory:
        whole = Ledger(Path(directory), "whole")
        parts = Ledger(Path(directory), "parts")
        execute(runs, whole, jobs=1, title="whole grid")
        execute(runs[::2], parts, jobs=1, title="part of the grid")
        done = execute(runs, parts, jobs=1, title="the rest")
        tables = [ledger.read().drop(columns=list(TIMINGS)) for ledger in (whole, parts)]
    both_empty = tables[0].isna() & tables[1].isna()
    cells = int(((tables[0] != tables[1]) & ~both_empty).to_numpy().sum())
    yield Check("resumed grid: cells of the CSV that differ", cells, 0.0, f"{len(runs)} runs")
    yield Check("resumed grid: finished runs that were repeated", done - len(runs[1::2]), 0.0)


def parity(device: str) -> Iterator[Check]:
    """triton_fused against reference: forward, first and second order of attention, and the meta-gradient."""
    on_cpu = device == "cpu"
    shape = ((2, 2, 1, 16), (2, 2, 12, 16)) if on_cpu else ((16, 16, 1, 64), (16, 16, 32, 64))
    note = f"query {shape[0]}, key {shape[1]}, float32 on {device}{', interpreted' if on_cpu else ''}"
    orders = zip(*(_derivatives(name, shape, device) for name in ("triton_fused", "reference")), strict=True)
    names = ("forward", "first order", "second order")
    for name, (found, expected) in zip(names, orders, strict=True):
        limit = FORWARD_LIMIT if name == "forward" else DERIVATIVE_LIMIT
        absolute = maximum((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        relative = _relative(found, expected)
        yield Check(f"parity, {name}: largest absolute error", absolute, limit, note)
        yield Check(f"parity, {name}: relative error", relative, limit, note)
    found, expected = (_meta_gradient(name, device) for name in ("triton_fused", "reference"))
    difference = relative_difference(found, expected)
    yield Check("parity, FULL meta-gradient: relative error", difference, DERIVATIVE_LIMIT, f"on {device}")


def _derivatives(
    backend: str, shape: tuple[tuple[int, ...], tuple[int, ...]], device: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Output, gradients, and the Hessian-vector product by query, key and value, of fixed random inputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape[0], shape[1], shape[1])
    inputs = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in sizes]
    directions = [torch.randn(s, generator=generator).to(device) for s in sizes]
    cotangent = torch.randn(shape[0], generator=generator).to(device)
    out = scaled_dot_product_attention(*inputs, backend=backend)
    first = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
    product = torch.stack([(g * u).sum() for g, u in zip(first, directions, strict=True)]).sum()
    second = torch.autograd.grad(product, inputs)
    return [out.detach()], [g.detach() for g in first], list(second)


def _meta_gradient(backend: str, device: str) -> dict[str, Tensor]:
    on_cpu = device == "cpu"
    spec, tasks, depth = (_SMALL, 2, 2) if on_cpu else (SeqClsSpec(), 16, 5)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = SeqClassifier(spec.width, spec.num_classes, backend=backend).to(device)
    batch = sample_tasks(spec, torch.arange(tasks, device=device), seed=0, epoch=0, stream="train")
    return meta_gradient(
        model, batch[:2], batch[2:4], mode="FULL", inner_steps=depth, inner_lr=Run().inner_lr
    ).grads


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    difference = math.hypot(
        *((a.double() - b.double()).norm().item() for a, b in zip(found, expected, strict=True))
    )
    return difference / math.hypot(*(b.double().norm().item() for b in expected))


def run_risk_checks(arguments: Sequence[str]) -> int:
    """Check determinism, parity of reference and triton_fused, and resumption; PASS, WARN or FAIL each.

    Determinism and resumption run on the CPU, and on --device cuda there as well. On a CPU the kernels run
    under Triton's interpreter, on a small shape.
    """
    options = parser("risk", run_risk_checks.__doc__)
    options.add_argument("--outer-steps", type=int, default=30, help="of each run")
    add_execution(options, "frozen")
    args = options.parse_args(arguments)
    run = dataclasses.replace(base_run(args), inner_steps=5)
    if run.outer_steps < 2:
        raise ValueError(f"--outer-steps must be at least 2, to stop halfway, got {run.outer_steps}")
    prepare_process()
    devices = dict.fromkeys(("cpu", args.device))
    runs = [dataclasses.replace(run, device=device) for device in devices]
    groups = [check(one) for one in runs for check in (determinism, resumed_training)]
    found = [check for group in (*groups, resumed_grid(runs[0]), parity(args.device)) for check in group]
    rows = [dataclasses.asdict(c) | {"verdict": c.verdict} for c in found]
    print("\n".join(risk_checks_table(rows)))
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, risk_checks_csv(args.out, args.tag))
    return int(any(check.verdict == "FAIL" for check in found))
