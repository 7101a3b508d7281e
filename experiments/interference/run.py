"""One run of the command line: from a model and two files to a folder of results."""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from callbacks.interference_figures import draw_heat_map
from experiments.interference.models import InputError, LanguageModel, load, token_loss
from experiments.interference.report import Report
from experiments.interference.tables import (
    conflict_table,
    head_table,
    mean_identity,
    sample_table,
    write_arrays,
)
from experiments.interference.tasks import Task, read_task
from theria.interference import InterferenceResult, Ridge, SampleGradients, collect, score
from theria.interference.significance import Significance, TooFewSamplesError, significance
from theria.provenance import device_name

_CONFLICTS = 100


def run(args: argparse.Namespace) -> Path:
    """Compute everything and write it to ``args.out``; the path of the report."""
    model = load(args.model, args.tokenizer)
    task_a, task_b = (
        read_task(path, model, samples=args.samples, max_tokens=args.max_tokens, field=args.field)
        for path in (args.task_a, args.task_b)
    )
    ridge, layout = _ridge(args.ridge), _layout(args.layout)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but no CUDA device is available")
    try:
        gradients = _collect(args, model, task_a, task_b, layout)
        halves = range(len(task_a.ids)), range(len(task_a.ids), len(gradients))
        result = score(gradients, *halves, variants=args.variants, fisher=args.fisher, ridge=ridge)
        tests = _tests(args, gradients, halves, ridge)
    except ValueError as error:
        # what the library says of arguments that do not fit the model
        raise InputError(str(error)) from error
    args.out.mkdir(parents=True, exist_ok=True)
    return _write(args, model, (task_a, task_b), result, tests)


def _collect(
    args: argparse.Namespace, model: LanguageModel, task_a: Task, task_b: Task, layout: dict[str, Any] | None
) -> SampleGradients:
    device = torch.device(args.device)
    return collect(
        model.model.to(device),
        token_loss,
        [tokens.to(device) for tokens in (*task_a.tokens, *task_b.tokens)],
        ids=(*task_a.ids, *task_b.ids),
        layers=args.layers,
        blocks=args.blocks,
        layout=layout,
        computation_device=args.device,
        memory_budget_mib=args.memory_mib,
    )


def _tests(
    args: argparse.Namespace, gradients: SampleGradients, halves: tuple[range, range], ridge: Ridge
) -> Significance | str:
    """Tests of every head, or why there are none."""
    if not args.test:
        return "it was not asked for"
    try:
        return significance(
            gradients,
            *halves,
            variant=args.test,
            ridge=ridge,
            correction=args.correction,
            level=args.level,
            permutations=args.permutations,
            seed=args.seed,
        )
    except TooFewSamplesError as error:
        return str(error)


def _write(
    args: argparse.Namespace,
    model: LanguageModel,
    tasks: tuple[Task, Task],
    result: InterferenceResult,
    tests: Significance | str,
) -> Path:
    tested = None if isinstance(tests, str) else tests
    heads = head_table(result, tested, confidence=args.confidence, resamples=args.resamples, seed=args.seed)
    conflicts = conflict_table(result, _CONFLICTS)
    write_arrays(args.out / "arrays.npz", result, tested)
    for name, table in (("heads", heads), ("conflicts", conflicts), ("samples", sample_table(*tasks))):
        table.to_csv(args.out / f"{name}.csv", index=False)
    for variant in result.variants:
        framed = None
        if tested is not None and variant == args.test:
            framed = {block: tested.significant(block) for block in result.blocks}
        draw_heat_map(result, variant, significant=framed).savefig(args.out / f"{variant}.png", dpi=120)
    report = Report(
        title=f"Interference of {tasks[0].name} and {tasks[1].name}",
        provenance=_provenance(args),
        model=model.name,
        tasks=(tasks[0].name, tasks[1].name),
        result=result,
        heads=heads,
        conflicts=conflicts,
        tests=tests,
        identity=mean_identity(result),
        top=args.top,
        confidence=args.confidence,
    )
    path: Path = args.out / "report.md"
    path.write_text(report.text(), encoding="utf-8")
    return path


def _provenance(args: argparse.Namespace) -> str:
    """Markdown lines naming every setting, the device and the versions."""
    settings = ", ".join(f"{name} {value}" for name, value in sorted(vars(args).items()) if value is not None)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"Settings: `{settings}`  \nDevice: {device_name(args.device)}  \nVersions: {versions}\n"


def _layout(given: str | None) -> dict[str, Any] | None:
    try:
        found = None if given is None else json.loads(given)
    except json.JSONDecodeError as error:
        raise InputError(f"--layout is not JSON: {error}") from error
    if not isinstance(found, dict | None):
        raise InputError(f"--layout must be a JSON object, received {given}")
    return found


def _ridge(given: str) -> Ridge:
    kind, _, value = given.partition(":")
    try:
        return Ridge(kind, float(value) if value else None)
    except ValueError as error:
        raise InputError(f"--ridge {given}: {error}") from error
