"""The summary's tables, as lines of Markdown."""

import math
from collections.abc import Sequence

import pandas as pd

from benchmarks.report import markdown_table
from experiments.operator_sensitivity.columns import OK
from experiments.operator_sensitivity.correlation import correlation
from experiments.operator_sensitivity.runs import MODES
from experiments.operator_sensitivity.statistics import against_baseline, cells, gains, pairs

PUBLISHED = {
    ("reference", "FULL"): {10: 0.9385, 20: 0.9389},
    ("reference", "FO"): {10: 0.9350, 20: 0.9408},
    ("triton_fused", "FULL"): {10: 0.9343, 20: 0.9411},
    ("triton_fused", "FO"): {10: 0.9329, 20: 0.9408},
}
"""Accuracies published for 1000 outer steps, mean over two seeds."""

PUBLISHED_OUTER_STEPS = 1000

_SIGNALS = {
    "attn_rel_diff": "relative difference of FULL and FO in q, k, v",
    "attn_second_order_path": "curvature through q, k, v, relative to the reference",
}

Lines = list[str]
Cells = dict[str, str]


def accuracy(sound: pd.DataFrame) -> Lines:
    """Mean over seeds by backend, mode and depth; of long runs beside what was published."""
    compared = set(sound["outer_steps"]) == {PUBLISHED_OUTER_STEPS}
    lines = []
    for _, row in cells(sound).iterrows():
        line = attention(sound, row) | {
            "mode": row["mode"],
            "k": str(row["inner_steps"]),
            "seeds": str(row["seeds"]),
            "accuracy": f"{row['final_acc']:.4f}",
            "± over seeds": number(row["final_acc_ci95"]),
            "query loss": f"{row['final_loss']:.4f}",
        }
        if compared:
            published = PUBLISHED.get((row["backend"], row["mode"]), {}).get(row["inner_steps"], math.nan)
            line |= {"published": number(published), "difference": signed(row["final_acc"] - published)}
        lines.append(line)
    return table(lines)


def paired(sound: pd.DataFrame) -> Lines:
    """FULL minus FO at every depth."""
    return table(
        [
            attention(sound, row) | {"k": str(row["inner_steps"])} | compared(row)
            for _, row in gains(sound).iterrows()
        ]
    )


def modes(sound: pd.DataFrame) -> Lines:
    """The table {mode -> attention signal present, accuracy gain}."""
    means = cells(sound)
    lines: list[Cells] = []
    for (backend, device, mode), own in means.groupby(["backend", "device", "mode"], sort=False):
        keeps = bool(own["attn_second_order_ok"].all())
        line = attention(sound, own.iloc[0]) | {
            "mode": mode,
            "attention gradient": yes(own["attn_grad_present"].all()),
            "operator keeps curvature": yes(keeps),
            "curvature used": yes(mode == "FULL" and keeps),
        }
        same = sound[(sound["backend"] == backend) & (sound["device"] == device)]
        over = gains(same, mode, "FO").set_index("inner_steps")["gain"]
        for depth in sorted(means["inner_steps"].unique()):
            known = mode != "FO" and depth in over.index
            line[f"gain over FO, k={depth}"] = signed(over[depth]) if known else ""
        lines.append(line)
    return table(sorted(lines, key=lambda line: MODES.index(line["mode"])))


def correlations(good: pd.DataFrame) -> Lines:
    """Whether gain goes with the operator's signal."""
    lines = []
    for _, own in good.groupby(["backend", "device"], sort=False):
        both = pairs(own)
        for signal, meaning in _SIGNALS.items():
            # of sound attention alone it is always 1
            if signal == "attn_second_order_path" and both["variant"].nunique() < 2:
                continue
            found = correlation(both, signal)
            known = not math.isnan(found.low)
            lines.append(
                attention(good, own.iloc[0])
                | {
                    "signal": meaning,
                    "points": str(found.points),
                    "seeds": str(found.seeds),
                    "Spearman's rho": signed(found.coefficient),
                    "95% interval": f"{signed(found.low)} to {signed(found.high)}" if known else "none",
                    "gain follows signal": _direction(found.low, found.high),
                }
            )
    return table(lines)


def variants(good: pd.DataFrame) -> Lines:
    """Every variant beside sound attention."""
    names = ["backend", "device", "variant", "mode", "inner_steps"]
    means = cells(good).set_index(names)
    lines = []
    for _, row in against_baseline(good).iterrows():
        own = means.loc[tuple(row[name] for name in names)]
        lines.append(
            attention(good, row)
            | {
                "variant": f"`{row['variant']}`",
                "mode": row["mode"],
                "k": str(row["inner_steps"]),
                "attention path": number(own["attn_second_order_path"]),
                "rel_diff": number(own["rel_diff_full_vs_fo"]),
                "second order ok": yes(own["attn_second_order_ok"]),
                "accuracy": number(own["final_acc"]),
            }
            | compared(row)
        )
    return table(lines)


def times(good: pd.DataFrame) -> Lines:
    """Seconds in all, milliseconds a step by depth, and memory."""
    depths = sorted(good["inner_steps"].unique())
    lines = []
    for (backend, device, mode), own in good.groupby(["backend", "device", "mode"], sort=False):
        steps = own.groupby("inner_steps")["mean_outer_step_time_s"].mean()
        peak = pd.to_numeric(own["peak_cuda_mem_bytes"]).max()
        lines.append(
            {
                "backend": backend,
                "device": device,
                "mode": mode,
                "runs": str(len(own)),
                "seconds in all": f"{own['wall_time_total_s'].sum():.0f}",
            }
            | {f"ms a step, k={k}": f"{1e3 * steps[k]:.2f}" if k in steps.index else "" for k in depths}
            | {"peak MiB": "" if pd.isna(peak) else f"{peak / 2**20:.0f}"}
        )
    return table(lines)


def failures(everything: pd.DataFrame) -> Lines:
    """Runs without figures, one line for those that failed alike."""
    failed = everything[everything["status"] != OK]
    groups = failed.groupby(["backend", "variant", "mode", "status", "error"], sort=False)
    return table(
        [
            {"backend": backend, "variant": variant, "mode": mode, "runs": str(len(own)), "status": status}
            | {"error": error}
            for (backend, variant, mode, status, error), own in groups
        ]
    )


def attention(shown: pd.DataFrame, row: pd.Series) -> Cells:
    """The backend of a row, and its device where the table shows several."""
    device = {"device": row["device"]} if shown["device"].nunique() > 1 else {}
    return {"backend": row["backend"], **device}


def compared(row: pd.Series) -> Cells:
    """What there is to say about a paired difference."""
    return {
        "pairs": str(row["pairs"]),
        "difference": signed(row["gain"]),
        "low": signed(row["low"]),
        "high": signed(row["high"]),
        "p, adjusted": number(row["p_adjusted"]),
        "statement": row["statement"],
    }


def table(lines: Sequence[Cells]) -> Lines:
    """A Markdown table whose columns are the names in its first line."""
    if not lines:
        return ["(none)"]
    return markdown_table(list(lines[0]), [[line[name] for name in lines[0]] for line in lines])


def signed(value: float) -> str:
    """With its sign; nothing for NaN."""
    return "" if pd.isna(value) else f"{value:+.4f}"


def number(value: float) -> str:
    """To four places; nothing for NaN."""
    return "" if pd.isna(value) else f"{value:.4f}"


def yes(value: object) -> str:
    """Yes or no."""
    return "yes" if value else "no"


def _direction(low: float, high: float) -> str:
    if math.isnan(low):
        return "not enough seeds"
    return "yes" if low > 0 else "the reverse" if high < 0 else "no correlation detected"
