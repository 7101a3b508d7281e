"""The gated perceptrons against their formula."""

import pytest
import torch

from theria.memory import AtlasMemory, GatedMLP


def test_atlas_memory_is_its_formula():
    torch.manual_seed(0)
    memory = AtlasMemory(6).double()
    x = torch.randn(2, 3, 6).double()
    w1, w2, w3 = (getattr(memory.mlp, name).weight for name in ("w1", "w2", "w3"))
    assert w1.shape == (6, 24)
    gate = x @ w2.T
    expected = x + (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w1.T
    torch.testing.assert_close(memory(x), expected)
    torch.testing.assert_close(memory.mlp(x), expected - x)


def test_no_bias_and_a_small_start():
    torch.manual_seed(0)
    memory = AtlasMemory(64, expansion=2)
    assert {name for name, _ in memory.named_parameters()} == {
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
    }
    for parameter in memory.parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
    assert GatedMLP(64, 10).w2.weight.shape == (10, 64)
