"""The tuning command's candidates and what it prints."""

import pytest

from benchmarks.tune_attention import candidates, report
from theria.attention.kernels.tiles import Tiles


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(("arithmetic", "stages"), [("half", {1, 2, 3}), ("ieee", {1})])
def test_every_width_and_arithmetic_has_candidates(arithmetic, stages, width):
    found = candidates(arithmetic, width)
    assert len(set(found)) == len(found) > 5
    assert {tiles.stages for tiles in found} == stages


def test_the_entry_names_the_fastest_and_reads_as_python():
    times = {Tiles(64, 32, 4, 1): 1.0, Tiles(32, 32, 4, 1): 2.0}
    lines = report("hopper", "ieee", 64, {"hvp_rows": times})
    entry = eval("{" + "".join(lines[:3]) + "}", {"Tiles": Tiles})
    assert entry == {("hopper", "ieee", 64): {"hvp_rows": Tiles(64, 32, 4, 1)}}
    assert lines[3] == "# hvp_rows: (64, 32, 4, 1) 1.000 ms, (32, 32, 4, 1) 2.000 ms; 2 fit"
