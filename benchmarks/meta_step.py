"""Seconds and peak memory of one meta-gradient, against a plain loop over tasks in the same process.

python -m benchmarks.meta_step --out docs/results/meta_step_cpu.md
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.measure import peak_bytes, seconds_in_turns
from benchmarks.report import fitted_exponent, markdown_table, provenance
from lightning_modules.host_memory import keep_freed_memory
from theria.cuda_graph import CapturedFunction
from theria.maml import MetaMode, meta_gradient
from theria.maml.task_model import Batch
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

INNER_LR = 0.4


def looped_meta_gradient(
    model: SeqClassifier, support: Batch, query: Batch, *, mode: MetaMode, inner_steps: int
) -> dict[str, Tensor]:
    """The peer: one task after the other, one autograd call an inner step."""
    initial = dict(model.named_parameters())
    total = [torch.zeros_like(p) for p in initial.values()]
    for x, y, query_x, query_y in zip(*support, *query, strict=True):
        adapted: dict[str, Tensor] = dict(initial)
        for _ in range(inner_steps):
            loss = F.cross_entropy(functional_call(model, adapted, (x,)), y)
            gradients = torch.autograd.grad(loss, list(adapted.values()), create_graph=mode is MetaMode.FULL)
            adapted = {n: p - INNER_LR * g for (n, p), g in zip(adapted.items(), gradients, strict=True)}
        loss = F.cross_entropy(functional_call(model, adapted, (query_x,)), query_y)
        for accumulated, gradient in zip(
            total, torch.autograd.grad(loss, list(initial.values())), strict=True
        ):
            accumulated += gradient / len(support[1])
    return dict(zip(initial, total, strict=True))


def draw(tasks: int, device: torch.device) -> tuple[Batch, Batch]:
    """One meta-batch of the study's task."""
    batch = sample_tasks(SeqClsSpec(), torch.arange(tasks, device=device), seed=0, epoch=0, stream="train")
    return (batch.support_x, batch.support_y), (batch.query_x, batch.query_y)


def contenders(
    plain: SeqClassifier,
    absorbed: SeqClassifier,
    data: tuple[Batch, Batch],
    *,
    mode: MetaMode,
    inner_steps: int,
) -> dict[str, Callable[[], object]]:
    """Every way to the same meta-gradient, by name; the loop is the peer."""
    batched = partial(meta_gradient, mode=mode, inner_steps=inner_steps, inner_lr=INNER_LR)
    ways: dict[str, Callable[[], object]] = {
        "loop": partial(looped_meta_gradient, plain, *data, mode=mode, inner_steps=inner_steps),
        "unrolled": partial(batched, plain, *data),
        "unrolled, absorbed": partial(batched, absorbed, *data),
        "sweep": partial(batched, plain, *data, strategy="sweep"),
        "sweep, absorbed": partial(batched, absorbed, *data, strategy="sweep"),
    }
    if data[0][0].is_cuda:
        for name, model in (("", plain), (", absorbed", absorbed)):
            for strategy in ("unrolled", "sweep"):
                compute = partial(batched, model, strategy=strategy)
                ways[f"{strategy}{name}, CUDA graph"] = captured(compute, data, model)
    return ways


def captured(
    compute: Callable[[Batch, Batch], object], data: tuple[Batch, Batch], model: SeqClassifier
) -> Callable[[], object]:
    """The same computation as a CUDA graph, replayed with the data copied in."""
    (x, y), (query_x, query_y) = data
    inputs = (x, y, query_x, query_y)
    graph = CapturedFunction(lambda a, b, c, d: compute((a, b), (c, d)), inputs, list(model.parameters()))
    return partial(graph, *inputs)


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 5, 10, 20, 50])
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[4, 8, 16, 32], help="sizes for the growth with tasks"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    keep_freed_memory()
    device = torch.device(args.device)
    torch.manual_seed(0)
    plain = SeqClassifier(64, 5, backend="reference").to(device)
    absorbed = SeqClassifier(64, 5, backend="reference", absorb_projections=True).to(device)
    absorbed.load_state_dict(plain.state_dict())
    lines = ["# One meta-gradient, 16 tasks of the frozen study", "", provenance("benchmarks.meta_step")]
    for mode in (MetaMode.FULL, MetaMode.FO):
        lines += _table_by_steps(plain, absorbed, mode, args.inner_steps, args.rounds, device)
    lines += _table_by_tasks(plain, absorbed, args.tasks, args.rounds, device)
    report = "\n".join(lines) + "\n"
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")


def _table_by_steps(
    plain: SeqClassifier,
    absorbed: SeqClassifier,
    mode: MetaMode,
    inner_steps: Sequence[int],
    rounds: int,
    device: torch.device,
) -> list[str]:
    data = draw(16, device)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for steps in inner_steps:
        ways = contenders(plain, absorbed, data, mode=mode, inner_steps=steps)
        for name, value in seconds_in_turns(ways, rounds=rounds).items():
            seconds.setdefault(name, []).append(value)
        for name, call in ways.items():
            if "graph" not in name:
                memory.setdefault(name, []).append(peak_bytes(call) / 2**20)
    lines = [f"## {mode.value}: milliseconds a meta-gradient (times the loop's speed), by inner steps", ""]
    rows = []
    for name, values in seconds.items():
        cells = [f"{1e3 * v:.1f} ({peer / v:.1f}x)" for v, peer in zip(values, seconds["loop"], strict=True)]
        rows.append([name, *cells, f"{fitted_exponent(inner_steps, values):.2f}"])
    columns = [f"k={k}" for k in inner_steps]
    lines += markdown_table(["way", *columns, "fitted exponent of k"], rows)
    lines += ["", f"## {mode.value}: peak MiB beyond the inputs, by inner steps", ""]
    unit = 16 * sum(p.numel() for p in plain.parameters()) * 4 / 2**20
    rows = []
    for name, values in memory.items():
        slope = (
            (values[-1] - values[0]) / (inner_steps[-1] - inner_steps[0]) if len(values) > 1 else float("nan")
        )
        rows.append([name, *(f"{v:.1f}" for v in values), f"{slope:.2f}"])
    slope_column = f"MiB a step ({unit:.2f} = tasks x parameters x 4 B)"
    return [*lines, *markdown_table(["way", *columns, slope_column], rows), ""]


def _table_by_tasks(
    plain: SeqClassifier, absorbed: SeqClassifier, tasks: Sequence[int], rounds: int, device: torch.device
) -> list[str]:
    seconds: dict[str, list[float]] = {}
    for count in tasks:
        ways = contenders(plain, absorbed, draw(count, device), mode=MetaMode.FULL, inner_steps=5)
        for name, value in seconds_in_turns(ways, rounds=rounds).items():
            seconds.setdefault(name, []).append(value)
    rows = [
        [name, *(f"{1e3 * v:.1f}" for v in values), f"{fitted_exponent(tasks, values):.2f}"]
        for name, values in seconds.items()
    ]
    header = ["way", *(f"{count} tasks" for count in tasks), "fitted exponent of tasks"]
    return ["## FULL, k=5: milliseconds a meta-gradient, by tasks", "", *markdown_table(header, rows)]


if __name__ == "__main__":
    main()
