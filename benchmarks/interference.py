"""Seconds and memory of interference scores, against a loop over pairs and heads and against vmap(grad).

python -m benchmarks.interference --layers 2 --out docs/results/interference_cpu.md
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import peak_bytes
from benchmarks.plain_transformer import PlainTransformer
from benchmarks.report import fitted_exponent, markdown_table, provenance
from theria.interference import (
    BLOCKS,
    VARIANTS,
    AttentionLayer,
    InterferenceResult,
    SampleGradients,
    collect,
    layout_from,
    score,
    score_matrices,
)

RIDGE = 1e-3
"""The library's default, times the mean of I over a block."""

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model and its samples, task A's before task B's."""

    model: PlainTransformer
    layout: tuple[AttentionLayer, ...]
    tokens: Tensor
    samples_a: int

    @property
    def tasks(self) -> tuple[range, range]:
        """Where the tasks' samples stand."""
        return range(self.samples_a), range(self.samples_a, len(self.tokens))

    @property
    def scores(self) -> int:
        """How many numbers are asked for."""
        heads = sum(p.heads for layer in self.layout for p in layer.projections.values())
        a, b = self.tasks
        return len(a) * len(b) * heads * len(VARIANTS)


def sequence_loss(model: PlainTransformer, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of one sequence's next tokens."""
    return F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:])


def problem(args: argparse.Namespace, *, layers: int | None = None, samples: int | None = None) -> Problem:
    """The model and random samples; a gated MLP of 8/3 the width has as many weights as a plain one of 4."""
    torch.manual_seed(0)
    device, depth = torch.device(args.device), layers or args.layers
    hidden = -(-args.width * 8 // 24) * 8
    model = PlainTransformer(args.vocab, width=args.width, blocks=depth, heads=args.heads, hidden=hidden)
    mapping = {"attention": "blocks.*", "qkv": "qkv", "order": "contiguous", "o": "o_proj"}
    count = samples or args.samples
    tokens = torch.randint(args.vocab, (2 * count, args.tokens), device=device)
    model = model.to(device)
    return Problem(model, layout_from(model, mapping), tokens, count)


def gathered(given: Problem, args: argparse.Namespace, budget: float | None = None) -> SampleGradients:
    """The library's gradients of all samples."""
    return collect(
        given.model,
        sequence_loss,
        list(given.tokens),
        layout=given.layout,
        computation_device=args.device,
        memory_budget_mib=budget or args.budget,
    )


def scored(given: Problem, gradients: SampleGradients) -> InterferenceResult:
    """The library's scores."""
    return score(gradients, *given.tasks, min_samples_for_fisher=1)


def one_gradient(given: Problem, sample: int) -> Gradients:
    """The loop's gradient of one sample: one backward to the attention's weights."""
    named = attention_weights(given)
    found = torch.autograd.grad(sequence_loss(given.model, given.tokens[sample]), list(named.values()))
    return dict(zip(named, found, strict=True))


def attention_weights(given: Problem) -> dict[str, Tensor]:
    """Weights that scores look at."""
    wanted = {f"{p.module}.weight" for layer in given.layout for p in layer.projections.values()}
    return {n: p for n, p in given.model.named_parameters() if n in wanted}


def vmapped_gradients(given: Problem, samples: range) -> Gradients:
    """The peer's gradients, stacked: ``vmap(grad)`` over samples of one length."""
    frozen = {n: p.detach() for n, p in given.model.named_parameters()}
    named = {n: frozen[n] for n in attention_weights(given)}

    def loss(weights: Gradients, tokens: Tensor) -> Tensor:
        logits = functional_call(given.model, {**frozen, **weights}, (tokens[None],))
        return F.cross_entropy(logits[0, :-1], tokens[1:])

    # the fused kernels have no vmap rule
    with sdpa_kernel(SDPBackend.MATH):
        found: Gradients = vmap(grad(loss), in_dims=(None, 0))(
            named, given.tokens[samples.start : samples.stop]
        )
    return found


def looped_scores(
    given: Problem, gradients_a: Sequence[Gradients], gradients_b: Sequence[Gradients], fisher: Gradients
) -> dict[tuple[str, int, int, int, str, int], float]:
    """The peer: every pair, layer, block and head by itself, gradients and Fisher information given."""
    found = {}
    for (i, own), (j, other) in itertools.product(enumerate(gradients_a), enumerate(gradients_b)):
        for number, layer in enumerate(given.layout):
            for block, projection in layer.projections.items():
                name = f"{projection.module}.weight"
                ridge = RIDGE * float(projection.weight_by_head(fisher[name]).mean())
                for head, features in enumerate(projection.features):
                    first, end = int(features[0]), int(features[-1]) + 1
                    g_i, g_j, information = (
                        projection.rows(tensors[name])[first:end] for tensors in (own, other, fisher)
                    )
                    divisor = information + ridge
                    place = (i, j, number, block, head)
                    found["directional", *place] = float((g_i.square() / divisor * g_j.abs()).sum())
                    found["signed", *place] = float((g_i * g_j / divisor).sum())
                    found["symmetric", *place] = float((g_i.abs() * g_j.abs() / divisor).sum())
    return found


def fisher_of(gradients: Sequence[Gradients]) -> Gradients:
    """Mean squares over some samples."""
    return {n: torch.stack([g[n] for g in gradients]).square().mean(dim=0) for n in gradients[0]}


def matrix_scores(given: Problem, stacked: Gradients, samples_a: int) -> dict[str, dict[str, Tensor]]:
    """Scores of stacked gradients, the first ``samples_a`` being task A's, by module and block."""
    found = {}
    for layer in given.layout:
        for block, projection in layer.projections.items():
            gradients = vmap(projection.weight_by_head)(stacked[f"{projection.module}.weight"]).flatten(2)
            a, b = gradients[:samples_a], gradients[samples_a:]
            found[f"{layer.name} {block}"] = score_matrices(a, b, a.square().mean(dim=0))
    return found


def products_of_one_block(given: Problem, heads: int, width: int) -> float:
    """Seconds of the library's products for one block whose gradients are held, of any values."""
    drawn = torch.randn(len(given.tokens), heads, width**2 // heads, device=given.tokens.device)
    a, b = (drawn[task.start : task.stop] for task in given.tasks)
    call = partial(score_matrices, a, b, a.square().mean(dim=0))
    call()
    return seconds(call)[0]


def seconds(call: Callable[[], object]) -> tuple[float, object]:
    """Wall-clock seconds of one call, and what it returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def measured(given: Problem, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the main table: way, seconds for gradients, for scores, together, rates and ratios."""
    total, (task_a, task_b) = given.scores, given.tasks
    # warm-up
    small = Problem(given.model, given.layout, given.tokens[:4], 2)
    scored(small, gathered(small, args))
    pairs = len(task_a) * len(task_b)
    gathering, gradients = seconds(partial(gathered, given, args))
    assert isinstance(gradients, SampleGradients)
    scoring, _ = seconds(partial(scored, given, gradients))
    held = gradients.store.held_bytes, gradients.store.spilled_bytes
    del gradients
    few = max(2, round(args.pairs**0.5))
    one_gradient(given, 0)
    each, own = seconds(lambda: [one_gradient(given, k) for k in range(2 * few)])
    assert isinstance(own, list)
    each /= 2 * few
    looping, values = seconds(lambda: looped_scores(given, own[:few], own[few:], fisher_of(own[:few])))
    assert isinstance(values, dict)
    rate = len(values) / looping
    chunk = min(args.vmap_samples, len(given.tokens))
    vmapped_gradients(given, range(1))
    vmapping, stacked = seconds(partial(vmapped_gradients, given, range(chunk)))
    assert isinstance(stacked, dict)
    vmapping *= len(given.tokens) / chunk
    del stacked
    samples = len(given.tokens)
    projections = [projection for layer in given.layout for projection in layer.projections.values()]
    multiplying = len(projections) * products_of_one_block(given, projections[0].heads, args.width)
    ways = {
        f"theria, {args.budget} MiB": (gathering, scoring),
        "loop, all gradients held": (samples * each, total / rate),
        "loop, gradients taken again for each pair": ((len(task_a) + pairs) * each, total / rate),
        "vmap(grad), all gradients held, theria's products": (vmapping, multiplying),
    }
    print(f"# held {held[0] / 2**20:.0f} MiB, in files {held[1] / 2**20:.0f} MiB", flush=True)
    whole = gathering + scoring
    return [
        [
            way,
            f"{first:.1f}",
            f"{second:.1f}",
            f"{first + second:.1f}",
            f"{total / second:.3g}",
            f"{second / scoring:.1f}",
            f"{(first + second) / whole:.1f}",
        ]
        for way, (first, second) in ways.items()
    ]


def growth(args: argparse.Namespace) -> list[str]:
    """Tables of the growth with pairs and with layers, and of the memory under budgets."""
    lines, by_pairs, rows = [], [], []
    for count in args.growth_samples:
        given = problem(args, layers=1, samples=count)
        gradients = gathered(given, args)
        scored(given, gradients)
        took = min(seconds(partial(scored, given, gradients))[0] for _ in range(3))
        by_pairs.append(took)
        peaks = []
        for budget in args.growth_budgets:
            within = gathered(given, args, budget)
            peaks.append(peak_bytes(partial(scored, given, within)) / 2**20)
        rows.append([f"{count} x {count}", f"{1e3 * took:.0f}", *(f"{peak:.1f}" for peak in peaks)])
    exponent = fitted_exponent([c * c for c in args.growth_samples], by_pairs)
    budgets = [f"peak MiB, budget {budget} MiB" for budget in args.growth_budgets]
    lines += ["", "## Scores of one layer, gradients given", ""]
    lines += markdown_table(["samples", "milliseconds", *budgets], rows)
    lines += ["", f"Fitted exponent of the number of pairs: {exponent:.2f}."]
    by_layers = []
    for layers in args.growth_layers:
        given = problem(args, layers=layers, samples=args.growth_samples[0])
        gradients = gathered(given, args)
        by_layers.append(min(seconds(partial(scored, given, gradients))[0] for _ in range(3)))
    exponent = fitted_exponent(args.growth_layers, by_layers)
    named = ", ".join(f"{n}: {1e3 * s:.0f} ms" for n, s in zip(args.growth_layers, by_layers, strict=True))
    lines += ["", f"By layers, and so by parameters ({named}): fitted exponent {exponent:.2f}."]
    return lines


def parser() -> argparse.ArgumentParser:
    """Options; the defaults are GPT-2 small."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--vocab", type=int, default=50257)
    options.add_argument("--samples", type=int, default=100, help="of each task")
    options.add_argument("--tokens", type=int, default=128, help="of each sample")
    options.add_argument("--budget", type=int, default=2048, help="MiB")
    options.add_argument("--pairs", type=int, default=4, help="that the loop is measured on, then scaled")
    options.add_argument("--vmap-samples", type=int, default=4, help="that vmap is measured on, then scaled")
    options.add_argument("--growth-samples", type=int, nargs="+", default=[10, 20, 40, 80])
    options.add_argument("--growth-budgets", type=int, nargs="+", default=[32, 128])
    options.add_argument("--growth-layers", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--out", type=Path, help="Markdown file to write")
    return options


def main() -> None:
    """Measure, print and write the tables."""
    args = parser().parse_args()
    given = problem(args)
    header = [
        "way",
        "gradients, s",
        "scores, s",
        "together, s",
        "scores a second",
        "scores: times theria's",
        "together: times theria's",
    ]
    all_gradients = len(given.tokens) * sum(4 * p.numel() for p in attention_weights(given).values())
    lines = [
        "# Interference scores",
        "",
        provenance("benchmarks.interference"),
        f"{args.layers} layers, {args.heads} heads, width {args.width}, vocabulary {args.vocab}; "
        f"{args.samples} x {args.samples} samples of {args.tokens} tokens; blocks {BLOCKS}, all three "
        f"variants: {given.scores:,} scores.",
        "",
        *markdown_table(header, measured(given, args)),
        "",
        "Theria's scores include forming gradients from their factors; peers' are given whole gradients, "
        f"{all_gradients / 2**30:.2f} GiB. The loop is measured on {max(2, round(args.pairs**0.5)) ** 2} "
        f"pairs and vmap on {args.vmap_samples} samples, and both are scaled to the whole.",
        *growth(args),
    ]
    report = "\n".join(lines) + "\n"
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
