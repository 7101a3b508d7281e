"""Heat maps of interference: layers by heads, a panel a block."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from theria.interference import InterferenceResult

TITLES = {"Q": "query", "K": "key", "V": "value", "O": "output"}
_MOST_NUMBERS = 16
"""Cells of a row up to which every cell bears its number."""


def draw_heat_map(
    result: InterferenceResult,
    variant: str,
    *,
    normalised: bool = False,
    significant: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Mean scores of all pairs by layer and head.

    Magnitudes are drawn in a map that grows evenly in lightness, signed scores in one that diverges around
    zero, with negative cells hatched: both read without colour. Cells without scores are crossed out, and
    significant ones framed.

    Args:
        result: of `theria.interference.compute`.
        variant: one of those computed.
        normalised: draw M_ij / |g_j|_1 instead of M_ij.
        significant: by block, which heads are, [layers, heads].
    """
    blocks = result.blocks
    widest = max(len(result.heads[block]) for block in blocks)
    size = (1.2 + len(blocks) * (1.6 + 0.42 * widest), 1.6 + 0.34 * len(result.layers))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    for axis, block in zip(axes, blocks, strict=True):
        values = result.layer_head_avg(variant, block, normalised=normalised)
        _panel(axis, values, signed=variant == "signed")
        axis.set_title(f"{block} ({TITLES[block]})", fontsize=9)
        axis.set_xticks(range(values.shape[1]), [str(head) for head in result.heads[block]], fontsize=7)
        axis.set_xlabel("head", fontsize=8)
        axis.set_yticks(range(values.shape[0]), [str(layer) for layer in result.layers], fontsize=7)
        if significant is not None:
            for layer, head in np.argwhere(significant[block]):
                _frame(axis, layer, head, edgecolor="black", linewidth=2, zorder=3)
    axes[0].set_ylabel("layer", fontsize=8)
    shown = "mean of M / |g_j|_1" if normalised else "mean of M"
    figure.suptitle(f"{variant}: {shown}, Fisher {result.fisher}", fontsize=10)
    return figure


def _panel(axis: Axes, values: np.ndarray, *, signed: bool) -> None:
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    scale = Normalize(-largest if signed else 0.0, largest)
    image = axis.imshow(
        np.ma.masked_invalid(values), cmap="RdBu" if signed else "cividis", norm=scale, aspect="auto"
    )
    bar = axis.figure.colorbar(image, ax=axis, fraction=0.08)
    bar.ax.tick_params(labelsize=6)
    for (layer, head), value in np.ndenumerate(values):
        if not np.isfinite(value):
            _frame(axis, layer, head, hatch="xx", edgecolor="0.6", linewidth=0)
            continue
        if signed and value < 0:
            _frame(axis, layer, head, hatch="///", edgecolor="0.35", linewidth=0)
        if values.shape[1] <= _MOST_NUMBERS:
            share = value / largest
            dark = abs(share) > 0.6 if signed else share < 0.5
            axis.text(
                head,
                layer,
                f"{value:.2g}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if dark else "black",
            )


def _frame(axis: Axes, layer: int, head: int, **style: object) -> None:
    axis.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, **style))  # type: ignore[arg-type]
