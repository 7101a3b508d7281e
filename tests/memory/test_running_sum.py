"""Sums over a shard so far, at lengths of one, two and three levels of chunks."""

import numpy as np
import pytest
import torch

from theria.memory.hebbian import SUMMED_AT_ONCE, running_sum


def drawn(length, *, shards=7, batch=2, heads=3):
    generator = torch.Generator().manual_seed(length)
    amount = torch.rand(batch, heads, length, generator=generator, dtype=torch.float64)
    ranks = torch.randint(shards, (batch, length), generator=generator).sort(dim=1).values
    return amount, ranks, torch.rand(batch, heads, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, SUMMED_AT_ONCE, SUMMED_AT_ONCE + 1, 700, SUMMED_AT_ONCE**2 + 70])
def test_a_sum_is_that_of_its_shard(length):
    amount, ranks, initial = drawn(length)
    found, final = running_sum(amount, ranks, initial)
    expected = np.empty(amount.shape)
    for row, ids in enumerate(ranks.tolist()):
        total, rank = initial[row].numpy(), 0
        for token, own in enumerate(ids):
            total = (total if own == rank else 0.0) + amount[row, :, token].numpy()
            rank = own
            expected[row, :, token] = total
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13)
    np.testing.assert_allclose(final.numpy(), expected[..., -1], rtol=1e-13)


def test_no_gradient_crosses_a_boundary():
    amount, ranks, initial = drawn(SUMMED_AT_ONCE**2 + 70)
    amount.requires_grad_()
    initial.requires_grad_()
    last = ranks == ranks[:, -1:]
    total, _ = running_sum(amount, ranks, initial)
    found = torch.autograd.grad((total * last.unsqueeze(1)).sum(), (amount, initial))
    assert (found[0][~last.unsqueeze(1).expand_as(amount)] == 0).all()
    assert (found[0][last.unsqueeze(1).expand_as(amount)] > 0).all()
    assert (found[1] == 0).all()


def test_what_is_not_finite_stays_in_its_shard():
    amount, ranks, initial = drawn(300)
    amount[:, :, 0] = torch.inf
    total, _ = running_sum(amount, ranks, initial)
    assert total[(ranks == 0).unsqueeze(1).expand_as(total)].isinf().all()
    assert total[(ranks > 0).unsqueeze(1).expand_as(total)].isfinite().all()
