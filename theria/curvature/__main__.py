"""Whether second-order learning through an attention callable is real.

    python -m theria.curvature my_kernels:attention --device cuda --dtype bfloat16
    python -m theria.curvature --known --dtype float32 bfloat16 float16 --device cuda

Exit status: 0 if no verdict reaches --fail-on, 1 if one does, 2 if the audit could not be made.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from theria.curvature.audit import AuditReport, audit
from theria.curvature.cases import Case, default_cases
from theria.curvature.convention import ConventionError
from theria.curvature.known import known_implementations
from theria.curvature.markdown import write_markdown
from theria.curvature.report import remarks, rows, tables, write_csv, write_json
from theria.curvature.verdicts import Verdict

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_NEVER = "NEVER"

Notes = dict[str, str]
"""Implementation and dtype -> what is said of it besides its report: that it is absent, or how it was run."""


class UsageError(Exception):
    """The audit cannot be made as asked."""


def load(path: str) -> Callable[..., Any]:
    """The callable that ``module:function`` names, with the current directory importable.

    Raises:
        UsageError: naming what is missing.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{path!r} is not of the form module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module's own code may raise anything
        raise UsageError(f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{path} is {type(found).__name__}, not a callable")
    return found


def _cases(text: str) -> tuple[Case, Case]:
    """The cases of a shape on the command line."""
    sizes = text.split("x")
    if len(sizes) != 5 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"a shape is five positive numbers BxHxLxSxE, got {text!r}")
    batch, heads, queries, keys, dim = map(int, sizes)
    return Case(batch, heads, queries, keys, dim), Case(batch, heads, queries, keys, dim, causal=True)


def _device(text: str) -> str:
    """A device that is here."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"a device is cpu, cuda or cuda:N, got {text!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"a device is cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"{text} is not here: there are {count} CUDA devices")
    return text


def _file(text: str) -> Path:
    """A file to write, in a folder that is made; most obstacles show before the audit, not after it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from error
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m theria.curvature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("callables", nargs="*", metavar="MODULE:FUNCTION", help="what to audit")
    parser.add_argument(
        "--known", nargs="*", metavar="NAME", help="audit the implementations people use (or those named)"
    )
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=_DTYPES)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_cases,
        default=[],
        metavar="BxHxLxSxE",
        help="probe these too, with and without causal mask: batch, heads, queries, keys, dim",
    )
    parser.add_argument("--layout", choices=("heads_first", "heads_last"), help="where it cannot be told")
    parser.add_argument("--inner-steps", type=int, nargs="*", default=[1, 5], help="depths of MAML")
    parser.add_argument("--steps", type=int, default=5, help="outer steps at each depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=_file, help="file to write the rows to")
    parser.add_argument("--json", type=_file, help="file to write everything to, case by case")
    parser.add_argument("--markdown", type=_file, help="file whose section of this device to write or renew")
    parser.add_argument(
        "--fail-on",
        choices=[verdict.value for verdict in Verdict if verdict is not Verdict.SAFE] + [_NEVER],
        help="the mildest verdict that fails; by default WRONG_CURVATURE, which is all but SAFE, and"
        f" {_NEVER} with --known",
    )
    args = parser.parse_args(arguments)
    if bool(args.callables) == (args.known is not None):
        parser.error("name what to audit: MODULE:FUNCTION, or --known")
    if args.steps < 1 or args.seed < 0 or any(count < 0 for count in args.inner_steps):
        parser.error("--steps must be at least 1, --inner-steps and --seed at least 0")
    return args


def audit_all(args: argparse.Namespace, console: Console) -> tuple[list[AuditReport], Notes]:
    """Every audit that the command line asks for, and notes on the known implementations."""
    reports: list[AuditReport] = []
    notes: Notes = {}
    more = tuple(case for pair in args.shapes for case in pair)
    options = {"device": args.device, "inner_steps": args.inner_steps, "steps": args.steps, "seed": args.seed}
    loaded = {path: load(path) for path in args.callables}
    for name in args.dtype:
        dtype = getattr(torch, name)
        for path, function in loaded.items():
            cases = default_cases(args.device) + more
            reports.append(
                audit(function, name=path, layout=args.layout, cases=cases, dtype=dtype, **options)
            )
        if args.known is None:
            continue
        known = known_implementations(args.device, dtype)
        unknown = set(args.known) - {implementation.name for implementation in known}
        if unknown:
            names = ", ".join(implementation.name for implementation in known)
            raise UsageError(f"--known does not know {', '.join(sorted(unknown))}; there are {names}")
        for implementation in known:
            if args.known and implementation.name not in args.known:
                continue
            if implementation.function is None:
                notes[f"{implementation.name}, {name}"] = f"absent, {implementation.absent}"
                continue
            if implementation.note:
                notes[f"{implementation.name}, {name}"] = implementation.note
            console.print(f"[dim]{implementation.name}, {name}", highlight=False)
            reports.append(
                audit(
                    implementation.function,
                    name=implementation.name,
                    convention=implementation.convention,
                    cases=(*(implementation.cases or default_cases(args.device)), *more),
                    task=implementation.task,
                    dtype=dtype,
                    **options,
                )
            )
    return reports, notes


def write(args: argparse.Namespace, reports: Sequence[AuditReport], notes: Notes) -> None:
    """Every file that the command line asks for."""
    if args.csv and reports:
        write_csv([row for report in reports for row in rows(report)], args.csv)
    if args.json:
        write_json(reports, args.json)
    if args.markdown:
        write_markdown(reports, notes, args.markdown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit, print and write; the exit status."""
    args = parse(arguments)
    console = Console(stderr=True)
    try:
        reports, notes = audit_all(args, console)
    except SystemExit as error:  # the status is the audit's to give
        print(f"theria.curvature: the callable ends the process (SystemExit: {error})", file=sys.stderr)
        return 2
    except (UsageError, ConventionError) as error:
        print(f"theria.curvature: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    out = Console()
    for table in tables(reports):
        out.print(table)
    for report in reports:
        lines = remarks(report)
        if lines:
            out.print(f"{report.name}, {str(report.dtype).removeprefix('torch.')}", style="bold")
            for line in lines:
                out.print(f"  {line}", markup=False, highlight=False)
    for name, said in notes.items():
        out.print(f"{name}: {said}", markup=False, highlight=False)
    try:
        write(args, reports, notes)
    except OSError as error:
        print(f"theria.curvature: cannot write: {error}", file=sys.stderr)
        return 2
    threshold = args.fail_on or (Verdict.WRONG_CURVATURE if args.known is None else _NEVER)
    if threshold == _NEVER:
        return 0
    return int(any(report.verdict.reaches(Verdict(threshold)) for report in reports))


if __name__ == "__main__":
    sys.exit(main())
