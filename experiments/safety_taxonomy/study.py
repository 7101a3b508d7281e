"""The crossed audit of broken variants and backends, and the files it writes."""

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence

import pandas as pd
import torch
from rich.console import Console

from experiments.safety_taxonomy.depth import differences_by_depth
from experiments.safety_taxonomy.picture import draw
from experiments.safety_taxonomy.summary import INTRODUCTION, summarise
from experiments.safety_taxonomy.variants import VARIANTS, Variant
from theria.curvature import Status, Verdict, audit
from theria.curvature.known import Implementation, theria_backend, versions
from theria.curvature.markdown import renew_sections, section_title
from theria.curvature.report import Row, rows
from theria.curvature.verdicts import one_line
from theria.provenance import device_name


def run(args: argparse.Namespace, backends: Sequence[str]) -> None:
    """Audit every variant over every backend, then write CSV, picture and summary.

    Raises:
        ValueError: for a variant or a device that there is not.
    """
    unknown = set(args.variants or ()) - set(VARIANTS)
    if unknown:
        raise ValueError(f"there is no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device")
    chosen = [variant for name, variant in VARIANTS.items() if not args.variants or name in args.variants]
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    console, found, notes = Console(), [], []
    for backend in backends:
        implementation = theria_backend(backend, device, dtype)
        if implementation.function is None:
            notes.append(f"{backend} is absent: {implementation.absent}.")
            continue
        steps = args.interpreter_steps if implementation.note else args.steps
        if implementation.note:
            notes.append(f"{backend}: {implementation.note}, {steps} outer step(s).")
        for variant in chosen:
            of_variant = crossed(
                variant,
                implementation,
                backend,
                device=device,
                dtype=dtype,
                steps=steps,
                inner_steps=args.inner_steps,
            )
            first = of_variant[0]
            console.print(
                f"{backend:13} {variant.name:34} {first['verdict']:17} {first['status']}", soft_wrap=True
            )
            found += of_variant
    table = pd.DataFrame(found)
    depths = differences_by_depth(args.inner_steps, range(args.seeds), device) if args.seeds else None
    title = section_title(device, dtype)
    beside = args.out.with_name(f"{args.out.stem}_{title.lower().replace(', ', '_').replace(' ', '_')}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(beside.with_suffix(".csv"), index=False)
    draw(table, beside.with_suffix(".png"))
    said = summarise(table, depths, [*_provenance(device), *notes], beside.with_suffix(".png").name)
    renew_sections(args.out, INTRODUCTION, {title: said})
    console.print(f"written: {args.out}, and beside it {beside.name}.csv and .png", soft_wrap=True)


def _provenance(device: torch.device) -> list[str]:
    command = shlex.join(["python", "-m", "experiments.safety_taxonomy", *sys.argv[1:]])
    return [
        f"Command: `{command}`",
        f"Device: {device_name(device)}",
        f"Versions: {versions()}, Python {platform.python_version()}",
    ]


def crossed(
    variant: Variant,
    implementation: Implementation,
    backend: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    inner_steps: Sequence[int],
) -> list[Row]:
    """One variant over one backend: a row for each depth, or a row with the error if even the audit fails."""
    assert implementation.function is not None
    try:
        report = audit(
            variant.wrap(implementation.function),
            name=backend,
            wrapper=variant.name,
            convention=implementation.convention,
            cases=implementation.cases,
            task=implementation.task,
            device=device,
            dtype=dtype,
            steps=steps,
            inner_steps=inner_steps,
        )
    except Exception as error:  # one variant, whatever it does, never stops the others
        return [
            {
                "wrapper": variant.name,
                "attention_backend": backend,
                "status": Status.HARD_FAIL_OTHER.value,
                "error": one_line(error),
                "verdict": Verdict.HARD_FAIL.value,
            }
        ]
    return rows(report)
