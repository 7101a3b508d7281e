"""The study's command line.

    python -m experiments.operator_sensitivity [grid] --device cpu --tag cpu
    python -m experiments.operator_sensitivity grid --device cuda --tag h200
    python -m experiments.operator_sensitivity report --tag cpu h200 --page docs/results/page.md
    python -m experiments.operator_sensitivity risk --tag cpu
    python -m experiments.operator_sensitivity search --tag search --jobs 2

Each command has its own --help; without a name it is the grid.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.operator_sensitivity.answer import answer
from experiments.operator_sensitivity.execute import execute
from experiments.operator_sensitivity.gate import CONDITIONS, judge
from experiments.operator_sensitivity.ledger import Ledger
from experiments.operator_sensitivity.operator import variant_named
from experiments.operator_sensitivity.options import (
    DEFAULT_OUT,
    add_configuration,
    add_execution,
    base_run,
    parser,
)
from experiments.operator_sensitivity.report import combine, write_page
from experiments.operator_sensitivity.risk_checks import run_risk_checks
from experiments.operator_sensitivity.runs import BACKENDS, GATED, MODES, grid, shard
from experiments.operator_sensitivity.search import run_search
from experiments.operator_sensitivity.summary import CHOICES


def run_grid(arguments: Sequence[str]) -> int:
    """Run the grid: backends x variants x modes x inner steps x seeds, gate between, artifacts at the end."""
    options = parser("grid", run_grid.__doc__)
    options.add_argument("--backends", nargs="+", default=CHOICES["backends"][1], choices=BACKENDS)
    options.add_argument(
        "--variants", nargs="+", default=CHOICES["variants"][1], metavar="NAME", help="see safety_taxonomy"
    )
    options.add_argument("--modes", nargs="+", default=CHOICES["modes"][1], choices=MODES)
    options.add_argument("--inner-steps", nargs="+", type=int, default=CHOICES["inner-steps"][1])
    options.add_argument("--seeds", nargs="+", type=int, default=CHOICES["seeds"][1])
    options.add_argument(
        "--override-gate", nargs="+", default=[], choices=CONDITIONS, help="conditions that need not be met"
    )
    add_configuration(options)
    add_execution(options, "frozen")
    args = options.parse_args(arguments)
    for name in args.variants:
        variant_named(name)
    runs = grid(
        base_run(args),
        backends=args.backends,
        variants=args.variants,
        modes=args.modes,
        inner_steps=args.inner_steps,
        seeds=args.seeds,
    )
    ledger = Ledger(args.out, args.tag, args.shard)
    mine = shard(runs, *args.shard) if args.shard else runs
    free = [run for run in mine if run.backend not in GATED]
    gated = [run for run in mine if run.backend in GATED]
    execute(free, ledger, jobs=args.jobs, retry_failed=args.retry_failed, title="reference runs")
    held_up = False
    if gated:
        verdict = judge([run for run in runs if run.backend in GATED], ledger.read(), args.override_gate)
        print("\n".join(verdict.lines()))
        held_up = not verdict.opens
    if gated and args.device == "cpu":
        print(f"{len(gated)} runs of {', '.join(GATED)} are left out: they train on --device cuda")
    elif gated and not held_up:
        execute(gated, ledger, jobs=args.jobs, retry_failed=args.retry_failed, title="gated runs")
    lines, strict = combine(ledger, args.out)
    page = args.out / f"operator_sensitivity_{args.tag}.md"
    write_page([lines], page)
    print(f"written: {page}, and beside it the CSVs and pictures of {args.tag}")
    # a partner without a row may be another shard's, which has not done it yet
    waiting = bool(args.shard) and not {run.run_id for run in runs} <= ledger.finished()
    disagreeing = strict.apart if waiting else strict.disagreeing
    if disagreeing:
        print(f"FO and FO_STRICT disagree: {'; '.join(disagreeing)}", file=sys.stderr)
    failed = (ledger.finished() - ledger.finished(failed_too=False)) & {run.run_id for run in mine}
    if failed:
        print(f"{len(failed)} of {len(mine)} runs have no figures, see {page}", file=sys.stderr)
    if disagreeing or failed:
        return 1
    return 3 if held_up else 0


def run_report(arguments: Sequence[str]) -> int:
    """Make the combined and summary CSVs, pictures and the page of one or several studies from their rows."""
    options = parser("report", run_report.__doc__)
    options.add_argument("--tag", nargs="+", required=True, help="studies, in the order of the page")
    options.add_argument("--source", type=Path, default=DEFAULT_OUT, help="directory of the rows")
    options.add_argument("--page", type=Path, required=True, help="Markdown file; the artifacts go beside it")
    options.add_argument("--preface", type=Path, help="Markdown file whose text opens the page")
    args = options.parse_args(arguments)
    ledgers = [Ledger(args.source, tag) for tag in args.tag]
    unknown = [ledger.tag for ledger in ledgers if not ledger.finished()]
    if unknown:
        raise ValueError(f"there are no rows of {', '.join(unknown)} in {args.source}")
    found = [combine(ledger, args.page.parent) for ledger in ledgers]
    preface = args.preface.read_text(encoding="utf-8").splitlines() if args.preface else []
    command = (
        f"python -m experiments.operator_sensitivity report --tag {' '.join(args.tag)} --page {args.page}"
    )
    heading = [f"This page: `{command}`, from the rows of the commands below.", ""]
    first = answer({ledger.tag: ledger.read() for ledger in ledgers})
    sections = [first, *(lines for lines, _ in found)]
    write_page(sections, args.page, [*heading, *([*preface, ""] if preface else [])])
    return int(any(strict.disagreeing for _, strict in found))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "grid": run_grid,
    "report": run_report,
    "risk": run_risk_checks,
    "search": run_search,
}


def main(given: list[str]) -> int:
    """Run a command.

    The exit status is 1 where a check or a run of the grid fails, 2 for wrong usage, and 3 where the gate is
    closed.
    """
    if given[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    name, rest = (given[0], given[1:]) if given and given[0] in COMMANDS else ("grid", given)
    try:
        return COMMANDS[name](rest)
    except ValueError as error:
        print(f"operator_sensitivity {name}: {error}", file=sys.stderr)
        return 2
