"""Heat maps show the means they are said to show, and read without colour."""

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from callbacks.interference_figures import draw_heat_map
from theria.interference import BlockDiagnostics, InterferenceResult, Ridge


def result_of(means, block="Q"):
    """A result of two pairs whose mean is the given one, [layers, heads]."""
    means = np.asarray(means, dtype=np.float64)
    scores = np.stack([means + 1, means - 1])[:, None]
    one, layers, heads = np.ones_like(means), *means.shape
    l1 = np.full((1, layers, heads), 2.0)
    shares = (one, one, one, one, one)
    return InterferenceResult(
        scores={"signed": {block: scores}, "symmetric": {block: scores}},
        ids_a=(0, 1),
        ids_b=(0,),
        layers=tuple(range(3, 3 + layers)),
        layer_names=("x",) * layers,
        heads={block: tuple(range(heads))},
        missing_a={block: np.zeros((2, layers), dtype=bool)},
        missing_b={block: np.zeros((1, layers), dtype=bool)},
        tokens_a=np.array([4, 4]),
        tokens_b=np.array([4]),
        fisher="a",
        ridge=Ridge(),
        diagnostics={block: BlockDiagnostics(np.concatenate([l1, l1]), l1, l1, *shares)},
    )


MEANS = [[-3.0, 1.0, np.nan], [0.5, -0.25, 2.0]]


def drawn(figure):
    axis = figure.axes[0]
    return axis, axis.images[0], [p for p in axis.patches if isinstance(p, Rectangle)]


@pytest.mark.parametrize(("normalised", "factor"), [(False, 1), (True, 0.5)])
def test_cells_are_the_means(normalised, factor):
    figure = draw_heat_map(result_of(MEANS), "signed", normalised=normalised)
    axis, image, _ = drawn(figure)
    np.testing.assert_allclose(np.ma.filled(image.get_array(), np.nan), factor * np.array(MEANS))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["3", "4"]
    shown = sorted(float(text.get_text()) for text in axis.texts)
    assert shown == pytest.approx(sorted(factor * v for v in [-3.0, 1.0, 0.5, -0.25, 2.0]), rel=0.06)


def test_signed_maps_diverge_around_zero_and_hatch_what_is_negative():
    _, image, patches = drawn(draw_heat_map(result_of(MEANS), "signed"))
    assert (image.norm.vmin, image.norm.vmax) == (-3, 3)
    hatched = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in patches if p.get_hatch() == "///"}
    assert hatched == {(0, 0), (1, 1)}
    crossed = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in patches if p.get_hatch() == "xx"}
    assert crossed == {(0, 2)}


def test_magnitudes_start_at_zero_and_grow_in_lightness():
    _, image, patches = drawn(draw_heat_map(result_of(np.abs(MEANS)), "symmetric"))
    assert (image.norm.vmin, image.norm.vmax) == (0, 3)
    assert not [p for p in patches if p.get_hatch() == "///"]
    colours = colormaps[image.cmap.name](np.linspace(0, 1, 50))
    lightness = colours[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_significant_heads_are_framed():
    significant = {"Q": np.array([[False, True, False], [False, False, True]])}
    _, _, patches = drawn(draw_heat_map(result_of(MEANS), "signed", significant=significant))
    framed = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in patches if p.get_hatch() is None}
    assert framed == {(0, 1), (1, 2)}


@pytest.mark.parametrize("means", [np.zeros((1, 2)), np.full((1, 2), np.nan)])
def test_nothing_to_see_is_drawn_too(means):
    _, image, _ = drawn(draw_heat_map(result_of(means), "signed"))
    assert (image.norm.vmin, image.norm.vmax) == (-1, 1)


def test_wide_layers_have_no_numbers():
    assert len(drawn(draw_heat_map(result_of(np.ones((1, 17))), "signed"))[0].texts) == 0
    assert len(drawn(draw_heat_map(result_of(np.ones((1, 16))), "signed"))[0].texts) == 16
