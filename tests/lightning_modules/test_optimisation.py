"""Which parameters decay, and the learning rate of every step."""

import math

import pytest
import torch

from lightning_modules.optimisation import WarmupCosine, decay_groups
from theria.models.memory_lm import MemoryLM


def optimizer(rate=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def test_weights_of_linear_maps_decay_and_nothing_else():
    model = MemoryLM(20, width=16, blocks=2, heads=2, window=4, memory_dim=8, slots=4)
    decayed, kept = decay_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert "weight_decay" not in decayed
    assert kept["weight_decay"] == 0
    found = {names[id(parameter)] for parameter in decayed["params"]}
    left = {names[id(parameter)] for parameter in kept["params"]}
    assert found | left == set(names.values())
    assert not found & left
    assert all(name.endswith("weight") for name in found)
    for part in ("norm", "embedding", "conv", "bias", "vectors", "scale"):
        assert not [name for name in found if part in name], part
    for part in ("q_proj.weight", "mlp.w1.weight", "gate.linear.weight", "atlas.mlp.w3.weight"):
        assert [name for name in found if part in name], part


def test_frozen_parameters_are_left_out():
    layer = torch.nn.Linear(2, 3)
    layer.bias.requires_grad_(False)
    decayed, kept = decay_groups(layer)
    assert [len(group["params"]) for group in (decayed, kept)] == [1, 0]


def test_the_rate_rises_falls_and_stays():
    sgd = optimizer()
    schedule = WarmupCosine(sgd, warmup_steps=4, total_steps=10, final_share=0.2)
    rates = []
    for _ in range(14):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    rise = [0.5 * (step + 1) / 4 for step in range(4)]
    fall = [0.5 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 6)) / 2) for step in range(6)]
    assert rates == pytest.approx([*rise, *fall, *[0.1] * 4])


def test_a_restored_schedule_goes_on():
    sgd, other = optimizer(), optimizer()
    schedule = WarmupCosine(sgd, warmup_steps=2, total_steps=9)
    fresh = WarmupCosine(other, warmup_steps=2, total_steps=9)
    for _ in range(5):
        sgd.step()
        schedule.step()
    fresh.load_state_dict(schedule.state_dict())
    other.step()
    fresh.step()
    sgd.step()
    schedule.step()
    assert other.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]


@pytest.mark.parametrize("values", [(-1, 10, 0.1), (10, 10, 0.1), (2, 10, 1.5), (2, 10, -0.1)])
def test_impossible_schedules_are_refused(values):
    with pytest.raises(ValueError, match="0 <= warmup_steps < total_steps"):
        WarmupCosine(optimizer(), *values)
