"""G2-3 passes for the projection that trains, and fails for each way of leaving norm_persistent out."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from experiments.training_gates.shard_start import measure_shard_start, shard_start_gate
from theria.memory import PersistentMemory, QKProjection, projection
from theria.memory.projection import ProjectionState
from theria.models.memory_lm import MemoryLM


def model(**changes: int) -> MemoryLM:
    torch.manual_seed(0)
    sizes = {"width": 32, "blocks": 2, "heads": 2, "window": 4, "memory_heads": 2, "memory_dim": 16}
    built = MemoryLM(50, **(sizes | changes))
    for part in built.modules():
        if isinstance(part, PersistentMemory):
            part.vectors.data.mul_(5)  # as wide heads have them: in narrow ones they count little
    return built


def tokens() -> Tensor:
    return torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))


def measured(precision=nullcontext):
    return measure_shard_start(model(), tokens(), precision)


@pytest.mark.parametrize("half", [False, True])
def test_it_passes_for_the_projection_of_the_model(half):
    found = measured(lambda: torch.autocast("cpu", torch.bfloat16, enabled=half))
    assert found.dtype == (torch.bfloat16 if half else torch.float32)
    gate = shard_start_gate(found)
    assert gate.passed, gate
    assert found.contrast > 1


def test_the_norm_counts_whatever_the_module_says_of_itself(monkeypatch):
    zeros = property(lambda self: torch.zeros(self.vectors.shape[1]))
    monkeypatch.setattr(PersistentMemory, "norm_persistent", zeros)
    found = measured()
    assert not shard_start_gate(found).passed
    assert found.reset == 1


def test_a_projection_without_norm_persistent_fails(monkeypatch):
    def without(self, q, k, *, segment_ids=None, state=None):
        projected, after = projection.causal_projection(
            q,
            k,
            self.persistent.m_persistent,
            torch.zeros_like(self.persistent.norm_persistent),
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            state=state,
        )
        return projected * self.scale[:, None, None], after

    monkeypatch.setattr(QKProjection, "forward", without)
    found = measured()
    assert found.query > 0.5
    assert found.running > 0.5
    assert not shard_start_gate(found).passed


def test_a_denominator_of_its_own_fails(monkeypatch):
    """Numbers that depend on norm_sum, and are not divided by it."""
    honest = QKProjection.forward

    def normalised(self, q, k, **options):
        projected, after = honest(self, q, k, **options)
        return torch.nn.functional.normalize(projected, dim=-1), after

    monkeypatch.setattr(QKProjection, "forward", normalised)
    found = measured()
    assert found.running < 1e-6
    assert not shard_start_gate(found).passed


def test_a_reset_of_the_numerator_alone_fails(monkeypatch):
    honest = QKProjection.reset_at_shard_boundary

    def numerator_alone(self, batch):
        state = honest(self, batch)
        return ProjectionState(state.memory, torch.zeros_like(state.norm_sum))

    monkeypatch.setattr(QKProjection, "reset_at_shard_boundary", numerator_alone)
    found = measured()
    assert found.query < 1e-5
    assert not shard_start_gate(found).passed


def test_shards_that_are_not_reset_fail(monkeypatch):
    honest = QKProjection.forward

    def never(self, q, k, *, segment_ids=None, state=None):
        return honest(self, q, k, state=state)

    monkeypatch.setattr(QKProjection, "forward", never)
    found = measured()
    assert found.reset < 1e-6
    assert not shard_start_gate(found).passed


def test_a_norm_that_is_wrong_in_the_forward_pass_alone_fails(monkeypatch):
    honest = QKProjection.forward

    def more(self, q, k, **options):
        projected, after = honest(self, q, k, **options)
        return projected, after._replace(norm_sum=after.norm_sum * 1.001)

    monkeypatch.setattr(QKProjection, "forward", more)
    found = measured()
    assert found.reset < 1e-6
    assert found.query < 1e-5
    assert not shard_start_gate(found).passed


@pytest.mark.parametrize("place", [0, 12, 23])
def test_every_start_of_a_shard_counts(monkeypatch, place):
    honest = QKProjection.forward

    def wrong_there(self, q, k, **options):
        projected, after = honest(self, q, k, **options)
        right = torch.arange(q.shape[2]) != place
        return projected * right[:, None], after

    monkeypatch.setattr(QKProjection, "forward", wrong_there)
    assert not shard_start_gate(measured()).passed


def test_one_layer_of_several_is_enough_to_fail(monkeypatch):
    built = model()
    last = [part for part in built.modules() if isinstance(part, QKProjection)][-1]
    honest = last.forward
    monkeypatch.setattr(last, "forward", lambda q, k, **options: (q, honest(q, k, **options)[1]))
    assert not shard_start_gate(measure_shard_start(built, tokens(), nullcontext)).passed


def test_a_persistent_memory_too_small_to_be_seen_fails():
    built = model()
    for part in built.modules():
        if isinstance(part, PersistentMemory):
            part.vectors.data.mul_(1e-4)
    assert not shard_start_gate(measure_shard_start(built, tokens(), nullcontext)).passed


def test_a_model_without_memory_is_refused():
    with pytest.raises(ValueError, match="has projected no query"):
        measure_shard_start(model(memory_heads=0), tokens(), nullcontext)
