"""The assemblers' comparison: what it runs, tells apart and says."""

import math

import torch

from benchmarks import assemblers
from benchmarks.assemblers import TOLERANCE, Case, cases, report
from theria.attention.custom import CustomOperators
from theria.attention.operators import Band


def test_every_pair_of_widths_is_met():
    pairs = {case.sizes[-2:] for case in cases() if case.precision == "ieee"}
    assert {(dim, value_dim) for dim in assemblers.WIDTHS for value_dim in assemblers.WIDTHS} <= pairs


def test_the_tolerance_lies_between_rounding_and_a_wrong_operand():
    torch.manual_seed(0)
    shapes = [(1, 2, 50, 16), (1, 2, 50, 16), (1, 2, 50, 32)] * 2 + [(1, 2, 50, 32)]
    drawn = [torch.randn(shape) for shape in shapes]
    band = Band(0.25, causal=True)

    def errors(changed):
        pairs = zip(
            assemblers._outputs(CustomOperators(), changed, band),
            assemblers._outputs(CustomOperators(), [t.double() for t in drawn], band),
            strict=True,
        )
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    assert max(errors(drawn)) < TOLERANCE / 5
    broken = [drawn[0], drawn[1].clone(), *drawn[2:]]
    broken[1][0, 0, 7] = 0
    assert max(errors(broken)) > 100 * TOLERANCE


def test_what_is_wrong_is_listed():
    right, wrong, fault = (Case((1, 2, 2, 9, 9, 16, width), True, "ieee") for width in (16, 32, 64))
    _, _, line = report({"ptxas 0.1": {right: 1e-7, wrong: 0.6, fault: math.inf}})
    assert line == "| ptxas 0.1 | 1 | 2 | 1.0e-07 | 16 x 32 ieee (error 0.6); 16 x 64 ieee (fault) |"
