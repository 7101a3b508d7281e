"""The first lines of a page of several studies: what they come to, every number from their rows."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from experiments.operator_sensitivity.correlation import correlation
from experiments.operator_sensitivity.runs import BASELINE, PAIRED
from experiments.operator_sensitivity.statistics import (
    ENOUGH_SEEDS,
    against_baseline,
    cells,
    gains,
    pairs,
    successful,
)
from experiments.operator_sensitivity.tables import PUBLISHED, PUBLISHED_OUTER_STEPS, Lines, signed
from theria.maml import MetaMode


def answer(studies: Mapping[str, pd.DataFrame]) -> Lines:
    """The section that somebody in a hurry reads.

    Args:
        studies: rows by tag.
    """
    sound = {
        tag: good[good["variant"] == BASELINE]
        for tag, table in studies.items()
        if len(good := successful(table))
    }
    good = {tag: successful(table) for tag, table in studies.items()}
    lines = [*_claims(sound), *_broken(good), *_reproduction(sound), *_backends(sound)]
    return ["## The answer", "", *lines, ""] if lines else []


def _claims(sound: Mapping[str, pd.DataFrame]) -> Lines:
    """FULL against FO wherever there are enough seeds for a claim."""
    said, fewer = [], []
    for tag, rows in sound.items():
        found = gains(rows)
        if (found["pairs"] < ENOUGH_SEEDS).any():
            fewer.append(tag)
        enough = found[found["pairs"] >= ENOUGH_SEEDS]
        for (backend, device, steps), own in enough.groupby(["backend", "device", "outer_steps"], sort=False):
            where = f"{backend} on {device}, {own['pairs'].min()} paired seeds, {steps} outer steps"
            depths = "; ".join(map(_difference, own.to_dict("records")))
            said.append(f"- **{tag}** ({where}), accuracy of FULL minus FO: {depths}.")
    if fewer:
        said.append(f"- Fewer than {ENOUGH_SEEDS} seeds, so no claim: {', '.join(fewer)}.")
    return said


def _broken(good: Mapping[str, pd.DataFrame]) -> Lines:
    """What attention that loses curvature comes to, and whether gain goes with the curvature that is kept."""
    said = []
    for tag, rows in good.items():
        if rows["variant"].nunique() < 2:
            continue
        compared = against_baseline(rows)
        full = compared[(compared["mode"] == MetaMode.FULL) & (compared["pairs"] >= ENOUGH_SEEDS)]
        for steps, own in full.groupby("inner_steps"):
            parts = [f"{said_of}: {', '.join(each['variant'])}" for said_of, each in own.groupby("statement")]
            said.append(
                f"- **{tag}**, attention of broken curvature, FULL at k = {steps}: {'; '.join(parts)}."
            )
        found = correlation(pairs(rows), "attn_second_order_path")
        if not math.isnan(found.low):
            said.append(
                f"- **{tag}**: over {found.points} pairs (depths, seeds, variants) the gain of FULL over FO"
                f" has the rank correlation {signed(found.coefficient)}"
                f" [{signed(found.low)}, {signed(found.high)}] with the curvature that attention keeps."
            )
    return said


def _difference(row: Mapping[Hashable, Any]) -> str:
    interval = f"[{signed(row['low'])}, {signed(row['high'])}]"
    return f"k = {row['inner_steps']}: {signed(row['gain'])} {interval}, {row['statement']}"


def _reproduction(sound: Mapping[str, pd.DataFrame]) -> Lines:
    """How far long runs are from the published accuracies."""
    differences = []
    for rows in sound.values():
        means = cells(rows[rows["outer_steps"] == PUBLISHED_OUTER_STEPS])
        for _, row in means.iterrows():
            published = PUBLISHED.get((row["backend"], row["mode"]), {}).get(row["inner_steps"])
            if published is not None:
                differences.append(float(row["final_acc"]) - published)
    if not differences:
        return []
    return [
        f"- Of {len(differences)} means that have a published one beside them (two seeds,"
        f" {PUBLISHED_OUTER_STEPS} outer steps), {sum(d > 0 for d in differences)} are above it, by"
        f" {signed(min(differences))} to {signed(max(differences))}."
    ]


def _backends(sound: Mapping[str, pd.DataFrame]) -> Lines:
    """Whether runs that differ in their backend alone come to the same accuracy."""
    said = []
    shared = [name for name in (*PAIRED, "mode") if name != "backend"]
    for tag, rows in sound.items():
        ours, theirs = (rows[rows["backend"] == name] for name in ("triton_fused", "reference"))
        both = ours.merge(theirs[[*shared, "final_acc"]], on=shared, suffixes=("", "_other"))
        if len(both):
            largest = (both["final_acc"] - both["final_acc_other"]).abs().max()
            runs = f"{len(both)} runs of triton_fused and the same runs of reference"
            said.append(f"- **{tag}**: {runs} differ in accuracy by at most {largest:g}.")
    return said
