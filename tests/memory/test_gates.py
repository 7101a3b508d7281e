"""Gates, the polarisation loss and its gradient, the schedule as state, and the statistics."""

import io
import itertools
import math

import pytest
import torch

from theria.memory import (
    PolarizationSchedule,
    TokenGate,
    gate_faults,
    gate_statistics,
    polarization_loss,
)


def test_gates_are_one_a_token_and_head_and_start_near_minus_two():
    torch.manual_seed(0)
    gate = TokenGate(64, 4)
    gates = gate(torch.randn(2, 5, 64))
    assert gates.shape == (2, 5, 4)
    assert torch.logit(gates).mean().item() == pytest.approx(-2, abs=0.1)
    assert gates.unique().numel() == gates.numel()
    assert gates.std() < 0.05


def test_gates_are_float32_under_autocast():
    gate = TokenGate(8, 2)
    x = torch.randn(1, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gate(x).dtype == torch.float32
    assert gate.double()(x.double()).dtype == torch.float64


def test_the_loss_is_its_formula():
    gates = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.9])
    assert polarization_loss(gates).item() == pytest.approx((0 + 0 + 1 + 0.5 + 0.2) / 5)


def test_the_loss_s_gradient_reaches_the_gate_s_weights():
    torch.manual_seed(0)
    gate = TokenGate(8, 2)
    loss = polarization_loss(gate(torch.randn(2, 5, 8)))
    loss.backward()
    assert (gate.linear.weight.grad != 0).all()
    # every gate starts below a half, so that closing them all is downhill
    assert (gate.linear.bias.grad > 0).all()


def test_the_gradient_on_a_gate_drives_it_to_its_side():
    gates = torch.tensor([0.1, 0.49, 0.51, 0.9], requires_grad=True)
    (gradient,) = torch.autograd.grad(polarization_loss(gates), gates)
    torch.testing.assert_close(gradient, torch.tensor([0.5, 0.5, -0.5, -0.5]))


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 5.05), ("cosine", 5.05), ("exponential", 1.0)],
)
def test_the_schedule_holds_then_falls(shape, middle):
    schedule = PolarizationSchedule(100, shape=shape)
    weights = []
    for _ in range(121):
        weights.append(schedule.weight().item())
        schedule.advance()
    assert weights[:11] == pytest.approx([10.0] * 11)
    assert weights[55] == pytest.approx(middle)
    assert weights[100:] == pytest.approx([0.1] * 21)
    assert all(a >= b for a, b in itertools.pairwise(weights))
    assert weights[12] < 10


def test_the_schedule_s_quarter():
    quarter = {
        "linear": 10 - 9.9 / 4,
        "cosine": 10 - 9.9 * (1 - math.cos(math.pi / 4)) / 2,
        "exponential": 10 * 0.01**0.25,
    }
    for shape, expected in quarter.items():
        schedule = PolarizationSchedule(80, hold=0.0, shape=shape)
        schedule.step.fill_(20)
        assert schedule.weight().item() == pytest.approx(expected)


def test_the_schedule_can_be_off_and_can_only_hold():
    off = PolarizationSchedule(10, initial=0.0, final=0.0, shape="linear")
    assert off.weight() == 0
    held = PolarizationSchedule(10, hold=1.0)
    held.step.fill_(9)
    assert held.weight() == 10
    held.step.fill_(20)
    assert held.weight() == pytest.approx(0.1)


def test_a_resumed_schedule_goes_on_exactly():
    schedule = PolarizationSchedule(50)
    for _ in range(17):
        schedule.advance()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    resumed = PolarizationSchedule(50)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(40):
        assert torch.equal(resumed.weight(), schedule.weight())
        resumed.advance()
        schedule.advance()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"hold": 1.5},
        {"initial": -1.0},
        {"final": 0.0},
        {"shape": "step"},
    ],
)
def test_wrong_schedules_are_named(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name):
        PolarizationSchedule(**({"steps": 10} | settings))


def test_statistics_are_per_token():
    gates = torch.zeros(2, 3, 4, 5)
    gates[..., 0] = 0.5  # a head that is undecided and deaf to its tokens
    gates[:, :, ::2, 1] = 1.0  # one that is open at every other token
    found = gate_statistics(gates)
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.7)
    assert found.high == pytest.approx(0.1)
    assert found.polarized_ratio == pytest.approx(0.8)
    assert found.token_std == pytest.approx(0.1)
    assert found.std == pytest.approx(gates.std(correction=0).item())


def test_statistics_are_detached_and_of_any_gates():
    gates = torch.rand(1, 1, 2, requires_grad=True)
    assert not any(value.requires_grad for value in gate_statistics(gates))
    assert gate_statistics(gates).token_std == 0


def statistics(mean=0.3, spread=0.2, decided=0.5):
    torch.manual_seed(0)
    gates = torch.full((1, 100, 1), mean)
    gates += spread * torch.tensor([1.0, -1.0]).repeat(50)[None, :, None]
    return gate_statistics(gates)._replace(low=torch.tensor(decided))


def test_healthy_gates_have_no_faults():
    assert gate_faults(statistics(), statistics(decided=0.6)) == ()
    assert gate_faults(statistics(), statistics()) == ()


@pytest.mark.parametrize(
    ("current", "fault"),
    [
        ({"mean": 0.005, "spread": 0.002}, "the gates are closed"),
        ({"mean": 0.995, "spread": 0.002}, "the gates are open"),
        ({"spread": 1e-4}, "the gates do not depend on their tokens"),
        ({"decided": 0.4}, "the gates do not polarise"),
        ({"mean": math.nan}, "the gates are not finite"),
    ],
)
def test_each_fault_is_named_alone(current, fault):
    (found,) = gate_faults(statistics(), statistics(**current))
    assert found.startswith(fault)


def test_the_gain_asked_for_is_configurable():
    (found,) = gate_faults(statistics(), statistics(decided=0.55), least_gain=0.1)
    assert "changed by +0.050 since the baseline, expected at least +0.100" in found
