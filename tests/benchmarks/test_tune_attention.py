"""The tuning command's candidates and what it prints."""

import pytest
import torch

from benchmarks.tune_attention import agree, candidates, report
from theria.attention.kernels.tiles import Tiles


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(("arithmetic", "stages"), [("half", {1, 2, 3}), ("ieee", {1})])
def test_every_width_and_arithmetic_has_candidates(arithmetic, stages, width):
    found = candidates("hvp_columns", arithmetic, width)
    assert len(set(found)) == len(found) > 2
    assert {tiles.stages for tiles in found} == stages


def test_exact_products_keep_64_rows_of_what_a_program_owns():
    assert min(tiles.queries for tiles in candidates("hvp_rows", "ieee", 128)) == 64
    assert min(tiles.keys for tiles in candidates("vjp_columns", "ieee", 128)) == 64
    assert min(tiles.queries for tiles in candidates("vjp_columns", "ieee", 128)) == 16


def test_wrong_numbers_are_told_from_rounding():
    exact = torch.randn(8, 8)
    assert agree([exact * (1 + 1e-6)], [exact], "ieee")
    assert agree([exact.bfloat16()], [exact.bfloat16()], "half")
    assert not agree([exact * 1.01], [exact], "ieee")
    assert not agree([exact, exact * torch.nan], [exact, exact], "tf32")


def test_the_entry_names_the_fastest_and_reads_as_python():
    times = {Tiles(64, 32, 4, 1): 1.0, Tiles(32, 32, 4, 1): 2.0}
    lines = report("hopper", "ieee", 64, {"hvp_rows": times})
    entry = eval("{" + "".join(lines[:3]) + "}", {"Tiles": Tiles})
    assert entry == {("hopper", "ieee", 64): {"hvp_rows": Tiles(64, 32, 4, 1)}}
    assert lines[3] == "# hvp_rows: (64, 32, 4, 1) 1.000 ms, (32, 32, 4, 1) 2.000 ms; 2 fit"
