"""A refused step leaves parameters and the optimiser's state as they were, on the host and on the device."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from callbacks.cool_down import CoolDown
from callbacks.refused_update import UpdateGuard, largest_gradient
from callbacks.step_readings import StepReadings

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "adamw, fused": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1),
}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((3, 2), (4,))]


def set_gradients(trained: list[torch.nn.Parameter], step: int, bad: float | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if bad is not None:
        trained[1].grad[2] = bad


def run(make: Make, steps: list[float | None], guarded: str) -> tuple[list[Tensor], Any]:
    """Steps with one bad gradient entry each where a number says so, guarded by a way to refuse."""
    trained = parameters()
    optimizer = make(trained)
    guard = UpdateGuard(optimizer)
    for step, bad in enumerate(steps):
        set_gradients(trained, step, bad)
        largest = largest_gradient(optimizer)
        assert largest is not None
        getattr(guard, guarded)(~torch.isfinite(largest))
        optimizer.step()
    guard.release()
    return [parameter.detach().clone() for parameter in trained], copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("guarded", ["refuse_if", "refuse_on_device_if"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_a_refused_step_is_none(name: str, guarded: str, bad: float, at: int) -> None:
    steps: list[float | None] = [None] * 5
    steps[at] = bad
    weights, state = run(OPTIMIZERS[name], steps, guarded)
    # the same without that step: its gradients are drawn, and never used
    trained = parameters()
    optimizer = OPTIMIZERS[name](trained)
    for step in range(5):
        if step != at:
            set_gradients(trained, step)
            optimizer.step()
    assert all(weight.isfinite().all() for weight in weights)
    if not (guarded == "refuse_on_device_if" and name in ("adam", "adamw")):
        # those count steps on the host, as documented
        torch.testing.assert_close(weights, [p.detach() for p in trained], rtol=0, atol=0)
        torch.testing.assert_close(state["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_good_step_is_the_optimisers_own(name: str) -> None:
    trained = parameters()
    optimizer = OPTIMIZERS[name](trained)
    for step in range(4):
        set_gradients(trained, step)
        optimizer.step()
    for guarded in ("refuse_if", "refuse_on_device_if"):
        weights, state = run(OPTIMIZERS[name], [None] * 4, guarded)
        torch.testing.assert_close(weights, [p.detach() for p in trained], rtol=0, atol=0)
        torch.testing.assert_close(state["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_an_update_is_undone_to_the_bit_in_any_dtype(dtype: torch.dtype) -> None:
    trained = [torch.nn.Parameter(torch.randn(3, 2).to(dtype)), torch.nn.Parameter(torch.randn(4))]
    with torch.no_grad():
        trained[1][0], trained[1][1] = -0.0, torch.inf
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9)
    guard = UpdateGuard(optimizer)
    for refused in (True, False):
        for p in trained:
            p.grad = torch.full_like(p, torch.nan if refused else 1.0)
        guard.refuse_on_device_if(torch.tensor(refused))
        optimizer.step()
        if refused:
            assert all(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
            assert torch.signbit(trained[1][0])
    assert not torch.equal(trained[0], before[0])
    assert trained[0].isfinite().all()


def test_the_largest_gradient_overflows_nowhere() -> None:
    trained = parameters()
    optimizer = torch.optim.SGD(trained, 0.1)
    assert largest_gradient(optimizer) is None
    set_gradients(trained, 0)
    trained[0].grad = torch.full((3, 2), -3e38)
    assert largest_gradient(optimizer).item() == pytest.approx(3e38)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_rates_are_lower_inside_of_a_step_alone(rate: Any) -> None:
    trained = [torch.nn.Parameter(torch.zeros(()))]
    optimizer = torch.optim.SGD(trained, rate)
    cooling = CoolDown(0.5)
    cooling.attach([optimizer])
    for active, after in ((False, -0.1), (True, -0.15), (True, -0.2), (False, -0.3)):
        cooling.active = active
        trained[0].grad = torch.ones(())
        optimizer.step()
        assert trained[0].item() == pytest.approx(after)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    cooling.active = True
    cooling.detach()
    optimizer.step()
    assert trained[0].item() == pytest.approx(-0.4)


def test_readings_come_in_order_and_as_late_as_they_may() -> None:
    readings = StepReadings(lag=1)
    came = []
    for step in range(1, 5):
        readings.put(step, 10 * step, torch.tensor([float(step), 0.0]))
        came.append([tuple(reading) for reading in readings.due()])
    assert came == [[], [(1, 10, [1.0, 0.0])], [(2, 20, [2.0, 0.0])], [(3, 30, [3.0, 0.0])]]
    assert [reading.step for reading in readings.all()] == [4]
    readings.put(5, 50, torch.zeros(2))
    readings.clear()
    assert list(readings.all()) == []
