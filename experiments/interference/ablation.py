"""The variants of the score beside one another: how far they rank pairs and heads alike."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from benchmarks.report import markdown_table
from experiments.interference.trained import Trained
from theria.interference import VARIANTS, InterferenceResult, score
from theria.interference.fisher import FISHERS

SAME = 0.95
"""Correlation and overlap from which a ranking counts as the same."""


class Row(NamedTuple):
    """One variant under one Fisher information; similarities are means over blocks.

    Attributes:
        variant, fisher: which.
        mean: score over pairs and heads.
        negative: share of pairs and heads with a score below 0.
        pairs: Spearman correlation with the same variant under task A's Fisher, over pairs and heads.
        heads: the same over the means of heads; NaN for a single head.
        overlap: share of the k strongest pairs that are among those under task A's Fisher.
        directional: Spearman correlation with the directional score under task A's Fisher; for the signed
            score that of conflict, its negative.
    """

    variant: str
    fisher: str
    mean: float
    negative: float
    pairs: float
    heads: float
    overlap: float
    directional: float


def ablation(trained: Trained, top: int) -> list[Row]:
    """Every variant under every Fisher information, of one model."""
    results = {
        fisher: score(trained.gradients, trained.task_a, trained.task_b, fisher=fisher) for fisher in FISHERS
    }
    return [_row(results, variant, fisher, top) for variant in VARIANTS for fisher in FISHERS]


def table(rows: list[Row], top: int) -> list[str]:
    """Lines of a Markdown table."""
    header = ["variant", "Fisher", "mean M", "M < 0", "pairs, beside A's", "heads, beside A's"]
    header += [f"top {top}, beside A's", "pairs, beside directional"]
    cells = [
        [row.variant, row.fisher, f"{row.mean:.3g}", f"{row.negative:.2f}", *map(_number, row[4:])]
        for row in rows
    ]
    return markdown_table(header, cells)


def verdict(rows: list[Row], top: int) -> str:
    """Whether pooling changes the ranking, in one sentence a variant."""
    lines = []
    for variant in VARIANTS:
        pooled = [row for row in rows if row.variant == variant and row.fisher != "a"]
        pairs, overlap = min(row.pairs for row in pooled), min(row.overlap for row in pooled)
        heads = [row.heads for row in pooled if not np.isnan(row.heads)]
        of_heads = f", of heads {min(heads):.3f}" if heads else ""
        changes = "changes" if min(pairs, overlap, *heads) < SAME else "hardly changes"
        lines.append(
            f"Pooling {changes} the {variant} ranking: correlation of pairs {pairs:.3f}{of_heads} and "
            f"{overlap:.0%} of the {top} strongest pairs at least."
        )
    return " ".join(lines) + f" (It changes a ranking where one of these is below {SAME}.)"


def _row(results: Mapping[str, InterferenceResult], variant: str, fisher: str, top: int) -> Row:
    found, alone = results[fisher], results["a"]
    values = {block: found.scores[variant][block] for block in found.blocks}
    sign = -1 if variant == "signed" else 1
    pairs, heads, overlap, directional = [], [], [], []
    for block, scores in values.items():
        pairs.append(_spearman(scores, alone.scores[variant][block]))
        heads.append(_spearman(found.layer_head_avg(variant, block), alone.layer_head_avg(variant, block)))
        overlap.append(_overlap(found, alone, variant, block, top))
        directional.append(_spearman(sign * scores, alone.scores["directional"][block]))
    every = np.concatenate([scores.ravel() for scores in values.values()])
    return Row(
        variant,
        fisher,
        float(np.nanmean(every)),
        float((every < 0).mean()),
        *(float(np.mean(part)) for part in (pairs, heads, overlap, directional)),
    )


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    known = np.isfinite(left) & np.isfinite(right)
    if known.sum() < 2:
        return float("nan")
    return float(spearmanr(left[known], right[known]).statistic)


def _overlap(
    found: InterferenceResult, alone: InterferenceResult, variant: str, block: str, top: int
) -> float:
    mine, theirs = (
        {conflict[:4] for conflict in result.top_conflicts(variant, block, top)} for result in (found, alone)
    )
    return len(mine & theirs) / max(len(theirs), 1)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"
