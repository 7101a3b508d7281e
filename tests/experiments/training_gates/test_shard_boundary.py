"""G2-8 passes for the model that trains, and fails where any of its parts looks over a shard boundary."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from experiments.training_gates.shard_boundary import BoundaryGradients, boundary_gate, measure_boundary
from theria.memory import AssociativeMemory, QKProjection, ShortConvolution
from theria.models.memory_lm import MemoryLM
from theria.models.window_attention import WindowAttention

REACH = 2 * 3


def model() -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(50, width=32, blocks=2, heads=2, window=4, memory_heads=2, memory_dim=16)


def measured(built: MemoryLM | None = None, precision=nullcontext):
    return measure_boundary(built or model(), tokens(), reach=REACH, precision=precision)


def tokens(length: int = 24) -> Tensor:
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("half", [False, True])
def test_it_passes_for_the_model(half):
    gate = boundary_gate(measured(precision=lambda: torch.autocast("cpu", torch.bfloat16, enabled=half)))
    assert gate.passed, gate
    assert "from at least 7 tokens back" in gate.measured


@pytest.mark.parametrize("part", [QKProjection, AssociativeMemory, ShortConvolution, WindowAttention])
def test_a_part_that_sees_no_boundary_fails(monkeypatch, part):
    honest = part.forward

    def blind(self, *inputs, segment_ids=None, **options):
        return honest(self, *inputs, **options)

    monkeypatch.setattr(part, "forward", blind)
    found = measured()
    assert found.across > 0
    assert not boundary_gate(found).passed


def test_a_memory_that_passes_no_gradient_fails(monkeypatch):
    honest = AssociativeMemory.forward

    def detached(self, *inputs, **options):
        read, state = honest(self, *inputs, **options)
        return read.detach(), state

    monkeypatch.setattr(AssociativeMemory, "forward", detached)
    found = measured()
    assert found.across == 0
    assert found.within == 0
    assert not boundary_gate(found).passed


def test_attention_alone_fails():
    built = model()
    built.memory_enabled = False
    assert not boundary_gate(measured(built)).passed


def test_numbers_that_are_not_finite_fail():
    built = model()
    with torch.no_grad():
        built.blocks[0].memory.in_proj.weight.fill_(torch.nan)
    assert not boundary_gate(measured(built)).passed


@pytest.mark.parametrize(
    ("across", "within"),
    [(1e-30, 0.1), (float("nan"), 0.1), (0.0, 0.0), (0.0, float("nan")), (0.0, float("inf"))],
)
def test_zero_is_exactly_zero_and_all_else_is_not(across, within):
    assert boundary_gate(BoundaryGradients(0.0, 1e-30, 7)).passed
    assert not boundary_gate(BoundaryGradients(across, within, 7)).passed


def test_a_shard_within_attentions_reach_is_refused():
    with pytest.raises(ValueError, match="must be longer than attention's reach of 6"):
        measure_boundary(model(), tokens(8), reach=REACH, precision=nullcontext)
