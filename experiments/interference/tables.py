"""The results of a run as arrays and as tables, from which its report is written."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.interference.tasks import Task
from theria.interference import InterferenceResult
from theria.interference.bootstrap import bootstrap_intervals
from theria.interference.significance import Significance

_EXCERPT = 80
_FIGURES = ("slice_size", "ridge_share", "clamped_share", "zero_share", "negative_share")


def write_arrays(path: Path, result: InterferenceResult, tests: Significance | None) -> None:
    """All arrays in one npz: ``scores_VARIANT_BLOCK`` [nA, nB, layers, heads] and the rest by name."""
    arrays: dict[str, np.ndarray] = {
        "ids_a": np.array([str(sample) for sample in result.ids_a]),
        "ids_b": np.array([str(sample) for sample in result.ids_b]),
        "layers": np.array(result.layers),
        "tokens_a": result.tokens_a,
        "tokens_b": result.tokens_b,
    }
    for block in result.blocks:
        arrays[f"heads_{block}"] = np.array(result.heads[block])
        arrays[f"missing_a_{block}"] = result.missing_a[block]
        arrays[f"missing_b_{block}"] = result.missing_b[block]
        for name, values in vars(result.diagnostics[block]).items():
            if values is not None:
                arrays[f"{name}_{block}"] = values
        for variant in result.variants:
            arrays[f"scores_{variant}_{block}"] = result.scores[variant][block]
        if tests is not None:
            arrays[f"p_values_{block}"] = tests.p_values[block]
            arrays[f"adjusted_{block}"] = tests.adjusted[block]
            arrays[f"effect_{block}"] = tests.effect[block]
    np.savez_compressed(path, allow_pickle=False, **arrays)


def head_table(
    result: InterferenceResult, tests: Significance | None, *, confidence: float, resamples: int, seed: int
) -> pd.DataFrame:
    """A row a head: means with their intervals, normalised means, diagnostics and tests."""
    parts = []
    for block in result.blocks:
        shape = (len(result.layers), len(result.heads[block]))
        columns: dict[str, object] = {
            "block": block,
            "layer": np.repeat(result.layers, shape[1]),
            "layer_name": np.repeat(result.layer_names, shape[1]),
            "head": np.tile(np.array(result.heads[block]), shape[0]),
        }
        for variant in result.variants:
            low, high = bootstrap_intervals(
                result.scores[variant][block], confidence=confidence, resamples=resamples, seed=seed
            )
            columns[variant] = result.layer_head_avg(variant, block).ravel()
            columns[f"{variant}_low"], columns[f"{variant}_high"] = low.ravel(), high.ravel()
            columns[f"{variant}_per_l1"] = result.layer_head_avg(variant, block, normalised=True).ravel()
        diagnostics = result.diagnostics[block]
        for task in "ab":
            columns[f"l1_{task}"] = _mean(getattr(diagnostics, f"gradient_l1_{task}")).ravel()
        for name in _FIGURES:
            values = getattr(diagnostics, name)
            if values is not None:
                columns[name] = values.ravel()
        if tests is not None:
            for name in ("effect", "p_values", "adjusted"):
                columns[name.removesuffix("s")] = getattr(tests, name)[block].ravel()
            columns["significant"] = tests.significant(block).ravel()
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def conflict_table(result: InterferenceResult, count: int) -> pd.DataFrame:
    """The strongest conflicts of every variant and block, strongest first."""
    rows = [
        {"variant": variant, "block": block, **conflict._asdict()}
        for variant in result.variants
        for block in result.blocks
        for conflict in result.top_conflicts(variant, block, count)
    ]
    return pd.DataFrame(rows, columns=["variant", "block", "sample_i", "sample_j", "layer", "head", "score"])


def sample_table(task_a: Task, task_b: Task) -> pd.DataFrame:
    """What the samples are: task, id, tokens and how they begin."""
    rows = [
        {"task": name, "id": sample, "tokens": len(tokens), "text": " ".join(text[:_EXCERPT].split())}
        for name, task in (("A", task_a), ("B", task_b))
        for sample, text, tokens in zip(task.ids, task.texts, task.tokens, strict=True)
    ]
    return pd.DataFrame(rows)


def mean_identity(result: InterferenceResult) -> float | None:
    """Largest | mean_i M_ij / |g_j|_1 - 1 | of the directional score over heads and samples of B.

    None where the score was not computed, or not with task A's Fisher information.
    """
    if "directional" not in result.variants or result.fisher != "a":
        return None
    found = []
    for block in result.blocks:
        size = result.diagnostics[block].live_l1_b
        mean = _mean(result.scores["directional"][block])
        known = np.isfinite(mean) & (size > 0)
        found.append(np.abs(mean[known] / size[known] - 1))
    joined = np.concatenate(found)
    return float(joined.max()) if joined.size else None


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis, of what is there; NaN where nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(axis=0) / known.sum(axis=0))
