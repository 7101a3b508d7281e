"""The peers of every published ratio compute the same gradients and scores."""

from functools import partial

import pytest
import torch

from benchmarks.interference import Seconds, gathered, of_layers, parser, report, scored, table
from benchmarks.interference_peers import (
    attention_weights,
    divisors_of,
    formed_gradient,
    looped_scores,
    one_gradient,
    problem,
    vmapped_gradients,
)
from theria.interference import score_matrices


@pytest.fixture(scope="module")
def case():
    sizes = "--layers 2 --heads 2 --width 16 --vocab 11 --samples 3 --tokens 6 --pairs 1 --vmap-samples 2"
    growth = "--growth-samples 1 2 3 --growth-layers 1 2 --growth-budgets 8 --growth-products 2 3"
    args = parser().parse_args(f"{sizes} {growth}".split())
    return args, problem(args)


def test_peers_take_the_same_gradients(case):
    _, given = case
    stacked = vmapped_gradients(given, range(6))
    assert len(attention_weights(given)) == 4
    for sample in range(6):
        for name, gradient in one_gradient(given, sample).items():
            torch.testing.assert_close(stacked[name][sample], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kept", [False, True])
def test_the_loop_computes_the_same_scores(case, kept):
    args, given = case
    gradients = gathered(given, args)
    result = scored(given, gradients)
    own = [one_gradient(given, sample) for sample in range(6)]
    gradient_of = partial(formed_gradient, gradients) if kept else own.__getitem__
    looped = looped_scores(given, range(3), range(3, 6), gradient_of, divisors_of(given, own[:3]))
    assert len(looped) == given.scores == 3 * 3 * 2 * 2 * 4 * 3
    for (variant, i, j, layer, block, head), value in looped.items():
        scale = looped["symmetric", i, j, layer, block, head]
        assert abs(result.scores[variant][block][i, j - 3, layer, head] - value) < 1e-4 * (abs(value) + scale)


def test_products_of_whole_gradients_are_the_same_scores(case):
    args, given = case
    result = scored(given, gathered(given, args))
    stacked = vmapped_gradients(given, range(6))
    for number, layer in enumerate(given.layout):
        for block, projection in layer.projections.items():
            weight = stacked[f"{projection.module}.weight"]
            by_head = torch.stack([projection.weight_by_head(g) for g in weight]).flatten(2)
            found = score_matrices(by_head[:3], by_head[3:], by_head[:3].square().mean(dim=0))
            for variant, expected in found.items():
                here = torch.from_numpy(result.scores[variant][block][:, :, number])
                scale = float(expected.abs().max())
                torch.testing.assert_close(here, expected.permute(1, 2, 0), rtol=1e-3, atol=1e-4 * scale)


def test_parts_of_the_layers_are_those_of_the_whole(case):
    args, given = case
    gradients = gathered(given, args)
    whole, part = scored(given, gradients), scored(given, of_layers(gradients, slice(1, 2)))
    assert part.layers == (1,)
    for block in "QKVO":
        expected = torch.from_numpy(whole.scores["signed"][block][:, :, 1:])
        assert torch.equal(torch.from_numpy(part.scores["signed"][block]), expected)


def test_ratios_are_between_ways_that_start_from_the_same(case):
    _, given = case
    took = Seconds(1.0, 2.0, 4.0, 40.0, 60.0, 8.0, 16.0)
    lines = table(given, took)
    assert [line.split("|")[2].strip() for line in lines[-3:]] == ["10.0", "30.0", "20.0"]
    assert lines[2].split("|")[2:5] == [" 1.0 ", " 2.00 ", " 3.0 "]
    assert lines[4].split("|")[2:5] == [" 8.0 ", " 4.00 ", " 12.0 "]


def test_the_page_has_every_part(case):
    args, given = case
    page = "\n".join(report(given, args))
    assert "2 layers, 2 heads, width 16, vocabulary 11; 3 x 3 samples of 6 tokens" in page
    assert "0 MiB in mapped files" in page
    assert page.count("Fitted exponent of the number of pairs") == 1
    assert "| 2 x 2 |" in page
    assert "(1: " in page
