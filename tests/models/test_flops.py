"""The count of operations against torch's own counter, and against sums by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from theria.models.flops import training_flops_per_token, visible_keys
from theria.models.memory_lm import MemoryLM


def build(**changes):
    torch.manual_seed(0)
    sizes = {"width": 32, "blocks": 2, "heads": 2, "window": 8, "memory_dim": 16, "slots": 4}
    return MemoryLM(50, **(sizes | changes))


def test_visible_keys_by_counting():
    for length, window in ((1, 4), (3, 4), (4, 4), (9, 4)):
        counted = sum(min(place + 1, window) for place in range(length)) / length
        assert visible_keys(length, window) == pytest.approx(counted)


def test_a_decoder_of_attention_alone_agrees_with_torchs_counter():
    model, tokens = build(memory_heads=0, window=24, backend="reference"), torch.randint(50, (3, 24))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    # the reference computes all scores of the square, of which the count takes the visible half;
    # and the first layer's input, the embedding, takes a gradient too
    scores = 3 * 2 * 4 * 32 * (24 - visible_keys(24, 24))
    assert 72 * (training_flops_per_token(model, 24) + scores) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


@pytest.mark.parametrize(("rule", "products"), [("hebbian", 4), ("delta", 5), ("gated_delta", 5)])
def test_a_memory_adds_its_products_and_its_maps(rule, products):
    model, without = build(rule=rule), build(memory_heads=0)
    weights = sum(
        module.weight.numel()
        for block in model.blocks
        for part in (block.memory, block.gate)
        for module in part.modules()
        if isinstance(module, torch.nn.Linear)
    )
    expected = 3 * 2 * (weights + 2 * products * 2 * 16**2)
    found = training_flops_per_token(model, 100) - training_flops_per_token(without, 100)
    assert found == pytest.approx(expected, rel=1e-12)
