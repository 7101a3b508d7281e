"""Seconds and memory of interference scores, against a loop over pairs and heads and against vmap(grad).

python -m benchmarks.interference --threads 2 --out docs/results/interference_cpu.md
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.interference_peers import (
    Problem,
    attention_weights,
    divisors_of,
    formed_gradient,
    looped_scores,
    one_gradient,
    problem,
    sequence_loss,
    vmapped_gradients,
)
from benchmarks.measure import peak_bytes
from benchmarks.report import fitted_exponent, markdown_table, provenance
from theria.interference import BLOCKS, InterferenceResult, SampleGradients, collect, score, score_matrices

Result = TypeVar("Result")

_TURNS = 12
"""Of all ways one after the other; the least disturbed time of each counts, where others use the machine."""


@dataclass(frozen=True)
class Seconds:
    """What each part took for all samples and pairs, in seconds.

    Attributes:
        collecting: the library's backward of every sample, which keeps factors of gradients.
        scoring: the library's scores from those factors.
        multiplying: its scores of whole gradients and Fisher information that are given.
        looping, looping_formed: the loop's, of whole gradients that are given, and of the library's factors,
            from which it forms those of one pair after the other.
        differentiating: one backward to all weights of attention of every sample.
        vmapping: the same by ``vmap(grad)``.
    """

    collecting: float
    scoring: float
    multiplying: float
    looping: float
    looping_formed: float
    differentiating: float
    vmapping: float


def gathered(given: Problem, args: argparse.Namespace) -> SampleGradients:
    """The library's gradients of all samples."""
    return collect(
        given.model,
        sequence_loss,
        list(given.tokens),
        layout=given.layout,
        computation_device=args.device,
        memory_budget_mib=args.budget,
    )


def scored(given: Problem, gradients: SampleGradients) -> InterferenceResult:
    """The library's scores."""
    return score(gradients, *given.tasks, min_samples_for_fisher=1)


def of_layers(gradients: SampleGradients, layers: slice) -> SampleGradients:
    """Gradients of some layers alone."""
    return replace(gradients, layers=gradients.layers[layers], layout=gradients.layout[layers])


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds of one call, and what it returned."""
    _synchronize()
    started = time.perf_counter()
    result = call()
    _synchronize()
    return time.perf_counter() - started, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(given: Problem, gradients: SampleGradients, args: argparse.Namespace) -> Seconds:
    """Times of all ways but collecting, which comes first."""
    samples, (task_a, task_b), layers = len(given.tokens), given.tasks, len(given.layout)
    few = max(1, round(args.pairs**0.5))
    few_a, few_b = task_a[:few], task_b[:few]
    print("# one gradient after the other", flush=True)
    one_gradient(given, 0)
    each, own = timed(lambda: {k: one_gradient(given, k) for k in (*few_a, *few_b)})
    divisors = divisors_of(given, [own[k] for k in few_a])
    held = partial(looped_scores, given, few_a, few_b, own.__getitem__, divisors)
    formed = partial(looped_scores, given, few_a, few_b, partial(formed_gradient, gradients), divisors)
    heads = given.layout[0].heads
    # values do not matter to products
    drawn = torch.randn(samples, heads, args.width**2 // heads, device=given.tokens.device)
    fisher = drawn[: len(task_a)].square().mean(dim=0)
    products = partial(score_matrices, drawn[: len(task_a)], drawn[len(task_a) :], fisher)
    products()
    times: dict[str, list[float]] = {name: [] for name in ("scoring", "products", "held", "formed")}
    print("# scores", flush=True)
    for turn in range(_TURNS):
        layer = turn % layers
        scoring = partial(scored, given, of_layers(gradients, slice(layer, layer + 1)))
        ways: tuple[Callable[[], object], ...] = (scoring, products, held, formed)
        for name, call in zip(times, ways, strict=True):
            times[name].append(timed(call)[0])
    del drawn, own
    print("# vmap", flush=True)
    together = min(args.vmap_samples, samples)
    vmapped_gradients(given, range(1))
    vmapping, _ = timed(partial(vmapped_gradients, given, range(together)))
    pairs = len(task_a) * len(task_b) / few**2
    return Seconds(
        collecting=0.0,
        scoring=min(times["scoring"]) * layers,
        multiplying=min(times["products"]) * given.blocks,
        looping=min(times["held"]) * pairs,
        looping_formed=min(times["formed"]) * pairs,
        differentiating=each / (2 * few) * samples,
        vmapping=vmapping / together * samples,
    )


def table(given: Problem, took: Seconds) -> list[str]:
    """The ways beside one another, and the ratios of those that start from the same."""
    ways = {
        "theria, from the factors kept": (took.collecting, took.scoring),
        "loop, from the factors kept, a pair at a time": (took.collecting, took.looping_formed),
        "theria's products, whole gradients given": (took.differentiating, took.multiplying),
        "loop, whole gradients given": (took.differentiating, took.looping),
        "vmap(grad), then theria's products": (took.vmapping, took.multiplying),
    }
    header = ["way", "gradients, s", "scores, s", "together, s", "scores a second"]
    rows = [
        [way, f"{first:.1f}", f"{second:.2f}", f"{first + second:.1f}", f"{given.scores / second:.3g}"]
        for way, (first, second) in ways.items()
    ]
    ratios = [
        ["whole gradients given to both", f"{took.looping / took.multiplying:.1f}"],
        ["factors given to both, within the budget", f"{took.looping_formed / took.scoring:.1f}"],
        ["factors given to theria, whole gradients to the loop", f"{took.looping / took.scoring:.1f}"],
    ]
    return [
        *markdown_table(header, rows),
        "",
        *markdown_table(["theria's rate of scores, times the loop's", "ratio"], ratios),
    ]


def growth(given: Problem, gradients: SampleGradients, args: argparse.Namespace) -> list[str]:
    """Tables of the growth with pairs and with layers, and of the memory under budgets."""
    print("# growth", flush=True)
    one, first, rows, times = of_layers(gradients, slice(1)), given.samples_a, [], {}
    for count in args.growth_samples:
        tasks = range(count), range(first, first + count)
        times[count] = best(partial(score, one, *tasks, min_samples_for_fisher=1))
        peaks = [peak_mib(replace(one, memory_bytes=budget * 2**19), tasks) for budget in args.growth_budgets]
        rows.append([f"{count} x {count}", f"{1e3 * times[count]:.0f}", *(f"{peak:.1f}" for peak in peaks)])
    products = {count: best(products_of_heads(given, count)) for count in args.growth_products}
    by_layers = {n: best(partial(scored, given, of_layers(gradients, slice(n)))) for n in args.growth_layers}
    budgets = [f"peak MiB, budget {budget} MiB" for budget in args.growth_budgets]
    fits = [exponent({count**2: took for count, took in found.items()}) for found in (products, times)]
    return [
        "",
        "## Scores of one layer, factors given",
        "",
        *markdown_table(["samples", "milliseconds", *budgets], rows),
        "",
        f"Fitted exponent of the number of pairs: {fits[1]:.2f}; the forming of gradients from factors grows "
        "with the number of samples.",
        "",
        f"Products of {_quarter(given)} heads of one block, whole gradients given, by samples of each task "
        f"({_named(products)}): fitted exponent of the number of pairs {fits[0]:.2f}.",
        "",
        f"By layers, and so by parameters ({_named(by_layers)}): fitted exponent {exponent(by_layers):.2f}.",
    ]


def best(call: Callable[[], object]) -> float:
    """Least seconds of three calls, after one."""
    call()
    return min(timed(call)[0] for _ in range(3))


def exponent(times: dict[int, float]) -> float:
    """Fitted to seconds by size."""
    return fitted_exponent(list(times), list(times.values()))


def products_of_heads(given: Problem, count: int) -> Callable[[], object]:
    """Products of a quarter of the heads of a block, for so many samples of each task."""
    (weight, *_) = attention_weights(given).values()
    entries = given.layout[0].projections["Q"].features.shape[1] * weight.shape[1]
    drawn = torch.randn(2 * count, _quarter(given), entries, device=weight.device)
    return partial(score_matrices, drawn[:count], drawn[count:], drawn[:count].square().mean(dim=0))


def _quarter(given: Problem) -> int:
    return max(1, given.layout[0].heads // 4)


def _named(times: dict[int, float]) -> str:
    return ", ".join(f"{size}: {1e3 * took:.0f} ms" for size, took in times.items())


def peak_mib(gradients: SampleGradients, tasks: tuple[range, range]) -> float:
    """Most that scoring holds beside what it is given."""
    threads = torch.get_num_threads()
    # a second thread has no part in how much is held, and waits long where rows are few
    torch.set_num_threads(1)
    try:
        return peak_bytes(partial(score, gradients, *tasks, min_samples_for_fisher=1)) / 2**20
    finally:
        torch.set_num_threads(threads)


def parser() -> argparse.ArgumentParser:
    """Options; the defaults are GPT-2 small."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--vocab", type=int, default=50257)
    options.add_argument("--samples", type=int, default=100, help="of each task")
    options.add_argument("--tokens", type=int, default=128, help="of each sample")
    options.add_argument("--budget", type=int, default=2048, help="MiB")
    options.add_argument("--pairs", type=int, default=4, help="that the loop is measured on, then scaled")
    options.add_argument("--vmap-samples", type=int, default=4, help="that vmap is measured on, then scaled")
    options.add_argument("--growth-samples", type=int, nargs="+", default=[25, 50, 100])
    options.add_argument("--growth-products", type=int, nargs="+", default=[100, 200, 400])
    options.add_argument("--growth-budgets", type=int, nargs="+", default=[64, 256])
    options.add_argument("--growth-layers", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--out", type=Path, help="Markdown file to write")
    return options


def report(given: Problem, args: argparse.Namespace) -> list[str]:
    """The page."""
    warm = replace(given, tokens=given.tokens[:4], samples_a=2)
    scored(warm, gathered(warm, args))
    collecting, gradients = timed(partial(gathered, given, args))
    kept = gradients.store.held_bytes / 2**20, gradients.store.spilled_bytes / 2**20
    took = replace(measured(given, gradients, args), collecting=collecting)
    whole = len(given.tokens) * sum(4 * p.numel() for p in attention_weights(given).values()) / 2**30
    return [
        "# Interference scores",
        "",
        provenance("benchmarks.interference"),
        f"{args.layers} layers, {args.heads} heads, width {args.width}, vocabulary {args.vocab}; "
        f"{args.samples} x {args.samples} samples of {args.tokens} tokens; blocks {BLOCKS}, all three "
        f"variants: {given.scores:,} scores. Budget {args.budget} MiB.",
        "",
        *table(given, took),
        "",
        f"Theria keeps factors of gradients, here {kept[0]:.0f} MiB in memory and {kept[1]:.0f} MiB in "
        "mapped files, and its scores from them include the Fisher information, the forming of whole "
        f"gradients and the diagnostics. Whole gradients would be {whole:.1f} GiB. The loop goes through "
        "pairs, layers, blocks and heads and sums the three equations, with I + ridge given. It is measured "
        f"on {max(1, round(args.pairs**0.5)) ** 2} pairs and vmap on {args.vmap_samples} samples, and both "
        f"are scaled to the whole. Scores were measured in {_TURNS} turns of all ways, theria's from factors "
        "a layer a turn, of which the least disturbed counts for each.",
        *growth(given, gradients, args),
    ]


def main() -> None:
    """Measure, print and write the tables."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    found = "\n".join(report(problem(args), args)) + "\n"
    print(found)
    if args.out:
        args.out.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
