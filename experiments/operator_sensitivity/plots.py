"""The study's pictures: every behavioural curve beside the operator's signal, as SVG and PNG.

Modes differ in marker, line style and lightness, backends in filled or hollow markers, so that grey prints
and colour-blind readers lose nothing.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.operator_sensitivity.fit import LAST_STEPS
from experiments.operator_sensitivity.ledger import Ledger
from experiments.operator_sensitivity.runs import BASELINE, MODES
from experiments.operator_sensitivity.statistics import cells, gains, pairs, successful

# Okabe and Ito's colours in the order of their lightness
_STYLES = {
    "FULL": ("#000000", "o", "-"),
    "FO": ("#0072B2", "s", "--"),
    "FO_STRICT": ("#E69F00", "^", ":"),
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_FIGURES: dict[str, Callable[[pd.DataFrame, Ledger], Figure | None]] = {}


def draw_all(
    table: pd.DataFrame, ledger: Ledger, directory: Path, prefix: str, only: Collection[str] | None = None
) -> list[str]:
    """Draw every figure, or only those named, that the table has data for; the names of the PNG files."""
    good = successful(table)
    written = []
    for name, draw in _FIGURES.items():
        figure = draw(good, ledger) if len(good) and (only is None or name in only) else None
        if figure is None:
            continue
        # a fixed salt and no date, so that the same table gives the same file
        with mpl.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "none"}):
            figure.savefig(directory / f"{prefix}_{name}.svg", metadata={"Date": None})
        figure.savefig(directory / f"{prefix}_{name}.png", dpi=130)
        plt.close(figure)
        written.append(f"{prefix}_{name}.png")
    return written


def _figure(draw: Callable[[pd.DataFrame, Ledger], Figure | None]) -> Callable[..., Figure | None]:
    _FIGURES[draw.__name__.removeprefix("draw_")] = draw
    return draw


@_figure
def draw_depth(table: pd.DataFrame, ledger: Ledger) -> Figure | None:
    """Accuracy, and the norm of the attention's meta-gradient, against inner steps."""
    means = cells(table[table["variant"] == BASELINE])
    if means.empty:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    depths = sorted(means["inner_steps"].unique())
    backends = list(dict.fromkeys(means["backend"]))
    lines = [(b, m) for b in backends for m in MODES]
    for i, (backend, mode) in enumerate(lines):
        own = means[(means["backend"] == backend) & (means["mode"] == mode)]
        if own.empty:
            continue
        colour, marker, style = _STYLES[mode]
        # side by side, since modes and backends often lie on each other
        x = own["inner_steps"].map(depths.index) + 0.06 * (i - (len(lines) - 1) / 2)
        for axis, column in ((left, "final_acc"), (right, "attn_grad_norm")):
            axis.errorbar(
                x,
                own[column],
                yerr=own[f"{column}_ci95"].fillna(0),
                color=colour,
                marker=marker,
                linestyle=style,
                markerfacecolor=colour if backend == backends[0] else "white",
                capsize=2,
                linewidth=1,
                label=f"{mode}, {backend}",
            )
    for axis, title in (
        (left, f"query accuracy, last {LAST_STEPS} outer steps"),
        (right, f"norm of the q, k, v meta-gradient, last {LAST_STEPS} outer steps"),
    ):
        axis.set_xticks(range(len(depths)), [str(k) for k in depths])
        axis.set_xlabel("inner steps")
        axis.set_title(title, fontsize=10)
        axis.grid(color="0.9")
    left.legend(fontsize=8)
    return figure


@_figure
def draw_convergence(table: pd.DataFrame, ledger: Ledger) -> Figure | None:
    """Query loss, and the norm of the attention's meta-gradient, against outer steps; a row a depth."""
    own = table[(table["variant"] == BASELINE) & (table["backend"] == table["backend"].iloc[:1].squeeze())]
    depths = sorted(own["inner_steps"].unique())
    if not depths or ledger.curves(own["run_id"].iloc[0]) is None:
        return None
    figure, axes = plt.subplots(
        len(depths), 2, figsize=(10, 2.4 * len(depths)), sharex=True, squeeze=False, layout="constrained"
    )
    for (loss_axis, norm_axis), depth in zip(axes, depths, strict=True):
        for mode in MODES:
            runs = own[(own["inner_steps"] == depth) & (own["mode"] == mode)]
            found = [c for run_id in runs["run_id"] if (c := ledger.curves(run_id)) is not None]
            if not found:
                continue
            losses = np.array([c["loss"] for c in found])
            norms = np.array([np.sqrt(sum(c[f"grad_norm_{p}_proj"] ** 2 for p in "qkv")) for c in found])
            _curve(loss_axis, losses, mode)
            _curve(norm_axis, norms, mode)
        loss_axis.set_ylabel(f"{depth} inner steps")
    axes[0, 0].set_title(f"query loss (nats), running mean over {LAST_STEPS} steps", fontsize=10)
    axes[0, 1].set_title("norm of the q, k, v meta-gradient", fontsize=10)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("outer steps")
    return figure


def _curve(axis: Axes, values: np.ndarray, mode: str) -> None:
    """Mean over seeds as a line, their range as a band."""
    window = min(LAST_STEPS, values.shape[1])
    smooth = np.array([np.convolve(v, np.ones(window) / window, mode="valid") for v in values])
    # a hundred points show a running mean, and keep the vector file small
    stride = -(-smooth.shape[1] // 100)
    smooth, steps = smooth[:, ::stride], np.arange(window, values.shape[1] + 1, stride)
    colour, marker, style = _STYLES[mode]
    every = max(len(steps) // 8, 1)
    start = MODES.index(mode) * every // len(MODES)
    axis.plot(
        steps,
        smooth.mean(0),
        color=colour,
        linestyle=style,
        marker=marker,
        markevery=(start, every),
        linewidth=1,
        label=mode,
    )
    axis.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.15, linewidth=0)
    axis.grid(color="0.9")


@_figure
def draw_gain(table: pd.DataFrame, ledger: Ledger) -> Figure | None:
    """Gain of FULL over FO against inner steps, and against the attention-local second-order signal."""
    paired, means = pairs(table), gains(table)
    if means.empty:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    depths = sorted(means["inner_steps"].unique())
    groups = list(dict.fromkeys(zip(means["backend"], means["variant"], strict=True)))
    for i, (backend, variant) in enumerate(groups):
        own = means[(means["backend"] == backend) & (means["variant"] == variant)]
        x = own["inner_steps"].map(depths.index) + 0.08 * (i - (len(groups) - 1) / 2)
        grey, marker = f"{0.7 * i / len(groups):.2f}", _MARKERS[i % len(_MARKERS)]
        half = (own["high"] - own["gain"]).fillna(0)
        label = backend if variant == BASELINE else f"{backend}, {variant}"
        left.errorbar(
            x, own["gain"], yerr=half, color=grey, marker=marker, linestyle="", capsize=3, label=label
        )
        of_group = paired[(paired["backend"] == backend) & (paired["variant"] == variant)]
        right.scatter(
            of_group["attn_rel_diff"], of_group["gain"], color=grey, marker=marker, s=18, label=label
        )
    left.set_xticks(range(len(depths)), [str(k) for k in depths])
    left.set_xlabel("inner steps")
    left.set_title("accuracy, FULL minus FO, paired by seed", fontsize=10)
    right.set_xlabel("|FULL - FO| / |FULL| of the q, k, v meta-gradient")
    right.set_title("the same against attention-local second-order signal", fontsize=10)
    for axis in (left, right):
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.grid(color="0.9")
    left.legend(fontsize=7)
    return figure


@_figure
def draw_variants(table: pd.DataFrame, ledger: Ledger) -> Figure | None:
    """Accuracy of every variant and mode beside the curvature its attention keeps, at the deepest depth."""
    if table["variant"].nunique() < 2:
        return None
    means = cells(table[table["inner_steps"] == table["inner_steps"].max()])
    variants = list(dict.fromkeys(means["variant"]))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.4 * len(variants)), sharey=True, layout="constrained"
    )
    for i, mode in enumerate(MODES):
        own = means[means["mode"] == mode]
        y = own["variant"].map(variants.index).astype(float) + 0.2 * (i - 1)
        colour, marker, _ = _STYLES[mode]
        left.errorbar(
            own["final_acc"],
            y,
            xerr=own["final_acc_ci95"].fillna(0),
            color=colour,
            marker=marker,
            linestyle="",
            capsize=2,
            label=mode,
        )
        right.plot(own["attn_second_order_path"], y, color=colour, marker=marker, linestyle="", label=mode)
    left.set_yticks(range(len(variants)), variants)
    left.invert_yaxis()
    left.set_title(f"query accuracy, {means['inner_steps'].iloc[0]} inner steps", fontsize=10)
    right.set_title("curvature through q, k, v, relative to the reference", fontsize=10)
    for axis in (left, right):
        axis.grid(color="0.9")
    left.legend(fontsize=8)
    return figure
