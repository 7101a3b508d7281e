"""Figures of needle-in-a-haystack probes, for TensorBoard."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from theria.memory.needle import NeedleRecall
from theria.models.needle_prompts import PromptRecall


def draw_heat_map(found: PromptRecall) -> Figure:
    """Accuracy by depth of the needle (across) and length of the prompt (down), 0 dark and 1 light.

    Colours are those of the cividis map, which reads alike in grey; the numbers stand in the cells.
    """
    lengths = sorted(found.cells)
    shares = [[share.value for share in found.cells[length]] for length in lengths]
    depths = len(shares[0])
    width, height = 1.1 + 0.8 * depths, 0.8 + 0.5 * len(lengths)
    figure = Figure(figsize=(width, height), dpi=80)
    # inches around the cells; matplotlib's own layout engines draw everything twice
    axes = figure.add_axes((0.9 / width, 0.6 / height, 0.8 * depths / width, 0.5 * len(lengths) / height))
    axes.imshow(np.array(shares), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            colour = "black" if value > 0.5 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(depths), [f"{(2 * bin_ + 1) / (2 * depths):.0%}" for bin_ in range(depths)])
    axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_xlabel("depth of the needle")
    axes.set_ylabel("tokens")
    return figure


def draw_capacity(found: Sequence[NeedleRecall], threshold: float) -> Figure:
    """Cosine read back against the pairs written beside the needle, with the rule's theory and a control."""
    figure = Figure(figsize=(4.4, 3.0), dpi=80)
    axes = figure.add_axes((0.14, 0.16, 0.84, 0.81))
    pairs = [point.pairs for point in found]
    stored, never = ([getattr(point, name) for point in found] for name in ("cosine", "never_stored"))
    for means, label, marker in ((stored, "read back", "o"), (never, "key never stored", "x")):
        values = [mean.value for mean in means]
        spread = [[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]]
        finite = np.nan_to_num(spread, posinf=0.0)
        axes.errorbar(pairs, values, yerr=finite, marker=marker, label=label, linestyle="")
    axes.plot(pairs, [point.theory for point in found], color="black", label="theory")
    axes.axhline(threshold, color="grey", linestyle=":", label="threshold")
    axes.set_xlabel("pairs beside the needle")
    axes.set_ylabel("cosine with the value written")
    axes.set_ylim(-0.3, 1.05)
    axes.legend(fontsize="small")
    return figure
