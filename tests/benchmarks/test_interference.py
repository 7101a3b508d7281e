"""The peers of every published ratio compute the same gradients and scores."""

import pytest
import torch

from benchmarks.interference import (
    attention_weights,
    fisher_of,
    gathered,
    looped_scores,
    matrix_scores,
    measured,
    one_gradient,
    parser,
    problem,
    scored,
    vmapped_gradients,
)


@pytest.fixture(scope="module")
def case():
    sizes = "--layers 2 --heads 2 --width 16 --vocab 11 --samples 3 --tokens 6 --pairs 1 --vmap-samples 2"
    args = parser().parse_args(sizes.split())
    return args, problem(args)


def test_peers_take_the_same_gradients(case):
    _, given = case
    stacked = vmapped_gradients(given, range(6))
    assert len(attention_weights(given)) == 4
    for sample in range(6):
        for name, gradient in one_gradient(given, sample).items():
            torch.testing.assert_close(stacked[name][sample], gradient, rtol=1e-4, atol=1e-7)


def test_peers_compute_the_same_scores(case):
    args, given = case
    result = scored(given, gathered(given, args))
    gradients = [one_gradient(given, sample) for sample in range(6)]
    looped = looped_scores(given, gradients[:3], gradients[3:], fisher_of(gradients[:3]))
    assert len(looped) == given.scores == 3 * 3 * 2 * 2 * 4 * 3
    for (variant, i, j, layer, block, head), value in looped.items():
        scale = looped["symmetric", i, j, layer, block, head]
        assert abs(result.scores[variant][block][i, j, layer, head] - value) < 1e-4 * (abs(value) + scale)
    products = matrix_scores(given, vmapped_gradients(given, range(6)), 3)
    for layer, found in enumerate(given.layout):
        for block in "QKVO":
            for variant, expected in products[f"{found.name} {block}"].items():
                here = torch.from_numpy(result.scores[variant][block][:, :, layer])
                scale = float(expected.abs().max())
                torch.testing.assert_close(here, expected.permute(1, 2, 0), rtol=1e-3, atol=1e-4 * scale)


def test_rows_of_the_table(case, capsys):
    args, given = case
    rows = measured(given, args)
    assert len(rows) == 4
    assert rows[0][-2:] == ["1.0", "1.0"]
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])
    assert "in files 0 MiB" in capsys.readouterr().out
