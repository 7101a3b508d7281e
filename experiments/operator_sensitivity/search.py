"""The search for a regime of the task in which second order pays, and the confirmation on fresh seeds."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import qmc

from experiments.operator_sensitivity.columns import OK
from experiments.operator_sensitivity.execute import execute
from experiments.operator_sensitivity.ledger import Ledger
from experiments.operator_sensitivity.options import add_execution, base_run, parser
from experiments.operator_sensitivity.plots import draw_all
from experiments.operator_sensitivity.report import PREFIX, combine, write_page, write_tables
from experiments.operator_sensitivity.runs import CELL, Run, from_fields, shard
from experiments.operator_sensitivity.statistics import gains, pairs, successful
from experiments.operator_sensitivity.tables import compared, correlations, number, table
from lightning_modules.atomic_file import atomic_file

LEVELS: dict[str, tuple[int, ...] | tuple[float, ...]] = {
    "seq_len": (16, 32, 64),
    "num_signal_positions": (1, 2, 4),
    "noise": (0.5, 1.0, 2.0),
    "inner_lr": (0.1, 0.4, 1.0),
    "inner_steps": (1, 2, 5, 10, 20),
}
"""What the search varies, and the values it tries."""

MODES = ("FULL", "FO")
SEARCH_SEEDS = (100, 101, 102)
FRESH_SEEDS = tuple(range(200, 208))
"""Seeds that neither the grid nor the search uses."""

_WAYS = tuple(LEVELS)
_STATED = ("device", "outer_steps", "versions", "commit")


def configurations(base: Run, count: int) -> list[Run]:
    """Points of the product of all levels, spread evenly by a Sobol sequence; always the same for a count.

    A longer list begins with the shorter one, so a search can be extended.

    Raises:
        ValueError: for more configurations than there are.
    """
    total = 1
    for levels in LEVELS.values():
        total *= len(levels)
    if not 1 <= count <= total:
        raise ValueError(f"there are 1 to {total} configurations to search, got {count}")
    # enough points to meet every combination
    points = qmc.Sobol(d=len(LEVELS), scramble=True, rng=0).random_base2(13)
    chosen = dict.fromkeys(
        tuple(levels[int(x * len(levels))] for x, levels in zip(point, LEVELS.values(), strict=True))
        for point in points
    )
    return [
        from_fields(dataclasses.asdict(base) | dict(zip(LEVELS, values, strict=True)))
        for values in list(chosen)[:count]
    ]


def paired_runs(bases: Sequence[Run], seeds: Sequence[int]) -> list[Run]:
    """FULL and FO of every configuration and seed."""
    return [
        dataclasses.replace(base, mode=mode, seed=seed) for base in bases for seed in seeds for mode in MODES
    ]


def ranked(everything: pd.DataFrame) -> pd.DataFrame:
    """Gain of FULL over FO by configuration, the one with the highest lower bound first."""
    return gains(everything).sort_values("low", ascending=False, na_position="last", ignore_index=True)


def winner(ranking: pd.DataFrame, least_depth: int) -> Run | None:
    """The first configuration of at least this depth whose gain is above zero; None if there is none."""
    known = ranking[(ranking["inner_steps"] >= least_depth) & (ranking["low"] > 0)]
    if known.empty:
        return None
    best = known.iloc[0]
    return from_fields({name: best[name] for name in CELL})


def run_search(arguments: Sequence[str]) -> int:
    """Search configurations for one where FULL beats FO, and confirm the winner on eight fresh seeds.

    The winner is the configuration of at least --least-depth inner steps with the highest lower bound of the
    gain's interval: at one inner step FULL wins in the frozen task already. A Sobol sequence spreads the
    configurations over length, signal positions, noise, inner rate and depth.
    """
    options = parser("search", run_search.__doc__)
    options.add_argument("--configurations", type=int, default=72)
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEARCH_SEEDS))
    options.add_argument("--fresh-seeds", type=int, nargs="+", default=list(FRESH_SEEDS))
    options.add_argument("--least-depth", type=int, default=5, help="fewest inner steps of a winner")
    options.add_argument("--outer-steps", type=int, default=300)
    options.add_argument("--full-projections", action="store_true", help="do not use the faster form")
    add_execution(options, "search")
    options.add_argument(
        "--page", type=Path, help="Markdown file, artifacts beside it; operator_sensitivity_<tag>.md in --out"
    )
    args = options.parse_args(arguments)
    if set(args.seeds) & set(args.fresh_seeds):
        raise ValueError(f"fresh seeds must be others than the search's {args.seeds}, got {args.fresh_seeds}")
    args.absorb_projections = not args.full_projections
    return _search(args)


def _search(args: argparse.Namespace) -> int:
    chosen = configurations(base_run(args), args.configurations)
    runs = paired_runs(chosen, args.seeds)
    ledger = Ledger(args.out, args.tag, args.shard)
    mine = shard(runs, *args.shard) if args.shard else runs
    execute(mine, ledger, jobs=args.jobs, retry_failed=args.retry_failed, title="search")
    page = args.page or args.out / f"{PREFIX}_{args.tag}.md"
    everything = write_tables(ledger, page.parent)
    pictures = draw_all(everything, ledger, page.parent, f"{PREFIX}_{args.tag}", only=("gain",))
    missing = {run.run_id for run in runs} - set(everything["run_id"])
    ranking = ranked(everything)
    best = None if missing else winner(ranking, args.least_depth)
    sections = [
        _search_section(everything, ranking, best, len(missing), args.least_depth),
        [f"![{picture}]({picture})" for picture in pictures] + [""],
    ]
    if best is not None:
        fresh = Ledger(args.out, f"{args.tag}_confirmed")
        execute(paired_runs([best], args.fresh_seeds), fresh, jobs=args.jobs, title="confirmation")
        sections.append(combine(fresh, page.parent)[0])
        with atomic_file(page.parent / f"{PREFIX}_{args.tag}_regime.yaml") as file:
            file.write(overlay(best).encode())
    write_page(sections, page, [*_command(everything, args), ""])
    print(f"written: {page}" + (f"; {len(missing)} runs are missing" if missing else ""))
    return 0


def _command(everything: pd.DataFrame, args: argparse.Namespace) -> list[str]:
    """The command of the search as the rows tell it, and what did the runs."""
    seeds = " ".join(str(seed) for seed in sorted(everything["seed"].unique()))
    found = {name: ", ".join(sorted(everything[name].astype(str).unique())) for name in _STATED}
    return [
        f"Command: `python -m experiments.operator_sensitivity search --device {found['device']}"
        f" --tag {args.tag}"
        f" --configurations {args.configurations} --seeds {seeds} --outer-steps {found['outer_steps']}`  ",
        f"{len(everything)} runs, {(everything['status'] == OK).sum()} succeeded; versions"
        f" {found['versions']}, commit {found['commit']}.",
    ]


def overlay(run: Run) -> str:
    """The configuration as an overlay of configs/meta_seqcls.yaml."""
    return f"""\
model:
  init_args:
    inner_steps: {run.inner_steps}
    inner_lr: {run.inner_lr}
data:
  init_args:
    length: {run.seq_len}
    num_signal_positions: {run.num_signal_positions}
    noise: {run.noise}
trainer:
  max_steps: {run.outer_steps}
"""


def _search_section(
    everything: pd.DataFrame, ranking: pd.DataFrame, best: Run | None, missing: int, least_depth: int
) -> list[str]:
    above = ranking[ranking["statement"].str.startswith("FULL")]
    below = ranking[ranking["statement"].str.startswith("FO ")]
    deep = above[above["inner_steps"] >= least_depth]
    said = f"{missing} runs are missing, so no winner is named."
    if not missing:
        said = "No configuration of that depth has a gain whose interval lies above zero."
    if best is not None:
        said = "The winner, confirmed below: " + ", ".join(f"{w} {getattr(best, w)}" for w in _WAYS) + "."
    return [
        "## Search for a regime in which second order pays",
        "",
        f"{len(ranking)} configurations with figures, {everything['seed'].nunique()} seeds,"
        f" {', '.join(map(str, sorted(everything['outer_steps'].unique())))} outer steps."
        f" FULL is higher in {len(above)} (in {len(deep)} at {least_depth} inner steps or more), FO in"
        f" {len(below)}. {said}",
        "",
        *table(_lines(everything, ranking)),
        "",
        *_left_out(everything),
        *correlations(successful(everything)),
        "",
    ]


def _lines(everything: pd.DataFrame, ranking: pd.DataFrame) -> list[dict[str, str]]:
    """A line a configuration; the means are those of the pairs, as the difference is."""
    both = pairs(everything).groupby(list(CELL))
    means = both[["final_acc", "final_acc_other"]].mean()
    return [
        {way: f"{row[way]:g}" for way in _WAYS}
        | {
            mode: number(means.loc[tuple(row[name] for name in CELL), column])
            for mode, column in zip(MODES, means.columns, strict=True)
        }
        | compared(row)
        for _, row in ranking.iterrows()
    ]


def _left_out(everything: pd.DataFrame) -> list[str]:
    """The runs without figures, which leave their partners out as well."""
    rows = everything[everything["status"] != OK]
    if rows.empty:
        return []
    lines = [
        {way: f"{row[way]:g}" for way in _WAYS}
        | {name: str(row[name]) for name in ("mode", "seed", "status", "error")}
        for _, row in rows.iterrows()
    ]
    said = f"{len(rows)} runs have no figures and are left out, and with each the run that it is paired with:"
    return [said, "", *table(lines), ""]
