"""Options that the study's commands have in common."""

import argparse
import dataclasses
from pathlib import Path

from experiments.operator_sensitivity.ledger import checked_tag
from experiments.operator_sensitivity.runs import Run, parse_shard

DEFAULT_OUT = Path("runs/operator_sensitivity")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """What the commands' parsers have in common."""
    return argparse.ArgumentParser(
        prog=f"python -m experiments.operator_sensitivity {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_execution(options: argparse.ArgumentParser, tag: str) -> None:
    """Options of every command that does runs."""
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--tag", default=tag, help="names the study's files; one tag, one study")
    options.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="directory of rows, curves and artifacts"
    )
    options.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="only the I-th of N fair shares, I from 0",
    )
    options.add_argument("--jobs", type=int, default=0, help="processes; 0 for one a CPU core, one on a GPU")
    options.add_argument("--retry-failed", action="store_true", help="do failed runs again")


def add_configuration(options: argparse.ArgumentParser) -> None:
    """Options for what is the same in all runs; the defaults are frozen."""
    fixed = {"backend", "variant", "mode", "inner_steps", "seed", "absorb_projections", "device"}
    aliases = {"meta_batch": ["--meta-batch-size"]}
    for field in dataclasses.fields(Run):
        if field.name not in fixed:
            names = [f"--{field.name.replace('_', '-')}", *aliases.get(field.name, [])]
            options.add_argument(*names, dest=field.name, type=type(field.default), default=field.default)
    options.add_argument(
        "--absorb-projections", action="store_true", help="the faster form of the same model"
    )


def base_run(args: argparse.Namespace) -> Run:
    """The configuration that the runs share.

    Raises:
        ValueError: for a run or a task that there cannot be, or a tag or directory that cannot be written to.
    """
    checked_tag(args.tag)
    if args.jobs < 0:
        raise ValueError(f"--jobs must be at least 0, got {args.jobs}")
    standing = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
    if not standing.is_dir():
        raise ValueError(f"--out {args.out}: {standing} is a file, not a directory")
    # of inner steps, seeds and so on the grid has several each
    names = {field.name for field in dataclasses.fields(Run)} - {"inner_steps"}
    run = Run(**{name: value for name, value in vars(args).items() if name in names})
    _ = run.spec  # refuses impossible tasks before anything runs
    return run
