"""The written summary, every number of which is computed from the CSV."""

import dataclasses
import math
from collections.abc import Sequence

import pandas as pd

from experiments.operator_sensitivity import tables
from experiments.operator_sensitivity.columns import OK
from experiments.operator_sensitivity.gate import verdict_on
from experiments.operator_sensitivity.runs import BASELINE, MODES, Run
from experiments.operator_sensitivity.statistics import (
    ENOUGH_SEEDS,
    NO_DIFFERENCE,
    against_baseline,
    gains,
    successful,
)
from experiments.operator_sensitivity.strictness import ATOL, RTOL, StrictAgreement
from experiments.operator_sensitivity.tables import Lines, signed

STRICT_POLICY = (
    "FO_STRICT runs, and its meta-gradient is FO's: the outer gradient reaches the initial parameters through"
    " sums alone, whether the adapted parameters are detached or not. It is kept as a check on accidental"
    " curvature, and is no third baseline."
)

ABSORBED = (
    "These runs absorb the key and value projections: they stand outside of attention, equal up to rounding"
    " while attention is sound. Where it is broken, gradient and curvature of values pass beside the broken"
    " part, which they cannot in the frozen model: the differences are this model's, not the frozen one's."
)

CHOICES: dict[str, tuple[str, list[str | int]]] = {
    "backends": ("backend", ["reference", "triton_fused"]),
    "variants": ("variant", [BASELINE]),
    "modes": ("mode", [*MODES]),
    "inner-steps": ("inner_steps", [1, 5, 10, 20]),
    "seeds": ("seed", [0, 1]),
}
"""The grid's options of several values: their columns, and the defaults."""

INTRODUCTION = (
    "When does second-order signal through attention turn into learning? FULL, FO and FO_STRICT meta-learn"
    " the same classifier on the same tasks from the same initial parameters. Every number below is computed"
    " from the CSVs beside this page (`_all.csv` has a row a run, `_summary.csv` a row a configuration), but"
    " for convergence and for FO against FO_STRICT, which take every outer step of the runs' own files.",
    "",
    "Accuracy, query loss and gradient norms are means over the last 20 outer steps. `rel_diff` is"
    " |FULL - FO| / |FULL| of the meta-gradient, taken five times along a run at its own parameters, whatever"
    " mode trains. `steps_to_90pct` is the first outer step by which 90% of the query loss's fall, from its"
    " first to its last 20 steps, is done in the running mean; `convergence_delta` is that fall."
    " `attn_second_order_ok` is asked of the attention that trained, on its device: second order straight"
    " through query, key and value runs and keeps at least 10% of each one's curvature."
    " `attn_second_order_path` is the magnitude of the support loss's curvature by the q, k, v projections"
    " relative to the explicit softmax in float64.",
    "",
)


def section(everything: pd.DataFrame, strict: StrictAgreement, tag: str, pictures: list[str]) -> Lines:
    """What one study, named by its tag, has found."""
    good = successful(everything)
    gate = verdict_on(everything)
    closed = [] if gate is None else [c.name for c in gate.conditions if not c.met]
    lines = [f"## {tag}", "", *_conditions(everything, tag, closed), ""]
    if good.empty:
        return [*lines, "No run has succeeded.", "", *tables.failures(everything), ""]
    sound = good[good["variant"] == BASELINE]
    parts = {
        "In short": _answer(sound),
        "The gate before the fused kernels": [] if gate is None else ["```", *gate.lines(), "```"],
        "Accuracy": tables.accuracy(sound),
        "FULL against FO": [
            "Pairs share a seed, so initial parameters and tasks. 95% t-interval of the mean difference;"
            " p-values adjusted by Benjamini and Hochberg.",
            "",
            *tables.paired(sound),
        ],
        "Signal and gain by mode": tables.modes(sound),
        "FO against FO_STRICT": _strict(strict),
        "Does gain follow signal?": [
            "Gain is FULL minus FO of a pair; a point is a depth, seed and variant. The interval resamples"
            " seeds.",
            "",
            *tables.correlations(good),
        ],
        "Variants that break curvature": _variants(good) if good["variant"].nunique() > 1 else [],
        "Time and memory": tables.times(good),
        "Runs without figures": tables.failures(everything) if len(good) < len(everything) else [],
    }
    for title, text in parts.items():
        lines += [f"### {title}", "", *text, ""] if text else []
    for picture in pictures:
        lines += [f"![{picture}]({picture})", ""]
    return lines


def command(everything: pd.DataFrame, tag: str, overridden: Sequence[str] = ()) -> str:
    """The command that makes these runs, with the options that are not its defaults.

    Args:
        everything: rows of the runs.
        tag: the study's name.
        overridden: conditions of the gate that the runs were made in spite of.
    """
    parts = ["python -m experiments.operator_sensitivity"]
    for option, (column, default) in CHOICES.items():
        values = list(dict.fromkeys(everything[column]))
        if values and values != default:
            parts.append(f"--{option} {' '.join(map(str, values))}")
    chosen = {column for column, _ in CHOICES.values()}
    for name, default in dataclasses.asdict(Run()).items():
        values = [] if name in chosen else everything[name].unique().tolist()
        if len(values) == 1 and values[0] != default:
            parts.append("--" + name.replace("_", "-") + ("" if default is False else f" {values[0]}"))
    if overridden:
        parts.append(f"--override-gate {' '.join(overridden)}")
    return " ".join([*parts, f"--tag {tag}"])


def _conditions(everything: pd.DataFrame, tag: str, closed: Sequence[str]) -> Lines:
    """How it was run, each value once, in the words of the CSV's columns."""

    def each(column: str) -> str:
        values = sorted(set(everything[column].dropna().tolist()))
        return f"{column} {', '.join(map(str, values))}"

    settings = (
        "outer_steps",
        "meta_batch",
        "inner_lr",
        "outer_lr",
        "seq_len",
        "num_signal_positions",
        "noise",
    )
    machine = ("absorb_projections", "dtype", "compute_dtype", "autocast", "device", "versions", "commit")
    whole = math.prod(everything[column].nunique() for column, _ in CHOICES.values())
    undone = whole - len(everything)
    return [
        f"Command: `{command(everything, tag, closed)}`  ",
        f"{len(everything)} runs, {(everything['status'] == OK).sum()} succeeded"
        f"{f', and {undone} of the command are not done' if undone > 0 else ''};"
        f" {', '.join(map(each, (*settings, 'seed')))};",
        f"{', '.join(map(each, machine))}.",
    ]


def _answer(sound: pd.DataFrame) -> Lines:
    """The sentences that somebody in a hurry reads."""
    found = gains(sound)
    if found.empty:
        return ["There are no pairs of FULL and FO to compare."]
    said = []
    for (backend, device), own in found.groupby(["backend", "device"], sort=False):
        parts = [
            f"k = {row['inner_steps']}: {row['statement']} ({signed(row['gain'])}{_interval(row)})"
            for _, row in own.iterrows()
        ]
        said.append(f"- {backend} on {device}, FULL minus FO: {'; '.join(parts)}.")
    fewest = int(found["pairs"].min())
    if fewest < ENOUGH_SEEDS:
        said.append(
            f"- {fewest} seeds a configuration: a reproduction, not a basis for a claim, which takes"
            f" {ENOUGH_SEEDS}."
        )
    return said


def _strict(strict: StrictAgreement) -> Lines:
    if not strict.compared and not strict.disagreeing:
        return ["There are no pairs to compare."]
    if not strict.holds:
        return [f"FAIL: {'; '.join(strict.disagreeing)}.", "", STRICT_POLICY]
    return [
        f"PASS: over {strict.compared} pairs of runs and {strict.steps} outer steps loss, accuracy and"
        f" gradient norms agree at every step within {RTOL:g} of themselves + {ATOL:g}; the query loss"
        f" differs by at most {strict.largest:.2e} of itself.",
        "",
        STRICT_POLICY,
    ]


def _variants(good: pd.DataFrame) -> Lines:
    compared = against_baseline(good)
    full = compared[compared["mode"] == "FULL"]
    changed, unchanged = full[full["statement"] != NO_DIFFERENCE], full[full["statement"] == NO_DIFFERENCE]
    return [
        f"Trained with FULL, {len(changed)} of {len(full)} cases differ in accuracy from sound attention"
        f" ({_names(changed)}); for the others {NO_DIFFERENCE} ({_names(unchanged)}). The difference is to"
        " sound attention in the same mode, at the same seed.",
        *(["", ABSORBED] if good["absorb_projections"].any() else []),
        "",
        *tables.variants(good),
    ]


def _names(rows: pd.DataFrame) -> str:
    return ", ".join(f"`{v}`" for v in dict.fromkeys(rows["variant"])) or "none"


def _interval(row: pd.Series) -> str:
    return "" if pd.isna(row["low"]) else f" [{signed(row['low'])}, {signed(row['high'])}]"
