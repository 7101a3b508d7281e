"""The taxonomy as a heat map: variants by diagnostics, light for sound and dark for gone or wrong."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

_ERRORS = ("forward", "vjp", "jvp", "hvp")
_KEPT = ("query", "key", "value", "cotangent")
_PATHS = {"": "path, all", "_attn": "path, attention", "_head": "path, head"}


def draw(table: pd.DataFrame, path: Path) -> None:
    """Write the picture of a table of audits.

    Colours are those of the cividis map, which grows evenly in lightness: it reads alike in grey and to
    colour-blind eyes. The numbers stand in the cells. Hatched cells were not reached or not offered.
    """
    backends = list(dict.fromkeys(table["attention_backend"]))
    variants = list(dict.fromkeys(table["wrapper"]))
    depths = sorted(table["inner_steps"].dropna().astype(int).unique()) if "inner_steps" in table else []
    columns = _columns(table, depths)
    size = (3.4 + 0.78 * len(columns), (1.5 + 0.34 * len(variants)) * len(backends) + 0.8)
    figure, axes = plt.subplots(len(backends), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, backend in zip(axes[:, 0], backends, strict=True):
        mine = table[table["attention_backend"] == backend]
        _panel(axis, backend, mine, variants, columns)
    bar = figure.colorbar(
        plt.cm.ScalarMappable(cmap="cividis"), ax=axes[:, 0], shrink=0.4, ticks=[0, 1], location="right"
    )
    bar.ax.set_yticklabels(["gone\nor wrong", "sound"])
    figure.savefig(path, dpi=90)
    plt.close(figure)


Column = tuple[str, Callable[[pd.DataFrame], float], Callable[[float], float]]
"""Title, the number of one variant's rows, and how sound that number is, from 0 to 1."""


def _columns(table: pd.DataFrame, depths: list[int]) -> list[Column]:
    found: list[Column] = [
        (f"{name} error\n(x allowed)", _first(f"{name}_of_allowed"), _within_tolerance) for name in _ERRORS
    ]
    found += [(f"kept,\n{name}", _first(f"surviving_{name}"), _near_one) for name in _KEPT]
    found += [
        (title.replace(" ", "\n"), _first(f"second_order_magnitude{suffix}"), _near_one)
        for suffix, title in _PATHS.items()
    ]
    for depth in depths:
        found.append((f"rel_diff\nk={depth}", _at(depth, "rel_diff_mean"), lambda _: math.nan))
        found.append((f"meta-grad\nerror, k={depth}", _at(depth, "meta_gradient_rel_error"), _small))
    return found


def _panel(axis: Axes, backend: str, table: pd.DataFrame, variants: list[str], columns: list[Column]) -> None:
    numbers = np.full((len(variants), len(columns)), math.nan)
    for i, variant in enumerate(variants):
        own = table[table["wrapper"] == variant]
        for j, (_, number, _) in enumerate(columns):
            numbers[i, j] = number(own)
    sound = np.array(
        [[columns[j][2](value) for j, value in enumerate(line)] for line in numbers], dtype=float
    )
    axis.imshow(np.ma.masked_invalid(sound), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(numbers):
        if math.isnan(value):
            axis.add_patch(
                Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor="0.7", linewidth=0)
            )
            continue
        dark = not math.isnan(sound[i, j]) and sound[i, j] < 0.5
        axis.text(
            j, i, _short(value), ha="center", va="center", fontsize=7, color="white" if dark else "black"
        )
    verdicts = {
        variant: table.loc[table["wrapper"] == variant, "verdict"].iloc[0]
        for variant in variants
        if (table["wrapper"] == variant).any()
    }
    axis.set_yticks(range(len(variants)), [f"{v}  [{verdicts.get(v, '')}]" for v in variants], fontsize=7)
    axis.set_xticks(range(len(columns)), [title for title, _, _ in columns], fontsize=7)
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axis.set_title(backend, fontsize=10, loc="left")
    axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(variants) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="minor", length=0)


def _first(column: str) -> Callable[[pd.DataFrame], float]:
    """The number of the first depth: derivatives and paths at initialisation are the same at each."""

    def number(rows: pd.DataFrame) -> float:
        return (
            float(rows[column].iloc[0])
            if column in rows and len(rows) and pd.notna(rows[column].iloc[0])
            else math.nan
        )

    return number


def _at(depth: int, column: str) -> Callable[[pd.DataFrame], float]:
    def number(rows: pd.DataFrame) -> float:
        return _first(column)(rows[rows["inner_steps"] == depth]) if "inner_steps" in rows else math.nan

    return number


def _within_tolerance(of_allowed: float) -> float:
    """1 up to what is allowed, 0 from a thousand times that."""
    return math.nan if math.isnan(of_allowed) else 1 - min(max(math.log10(max(of_allowed, 1)) / 3, 0), 1)


def _near_one(value: float) -> float:
    return math.nan if math.isnan(value) else 1 - min(abs(value - 1), 1)


def _small(error: float) -> float:
    """1 for a thousandth or less, 0 for an error as large as the gradient."""
    return math.nan if math.isnan(error) else 1 - min(max(math.log10(max(error, 1e-3)) / 3 + 1, 0), 1)


def _short(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
