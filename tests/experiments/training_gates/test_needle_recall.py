"""G2-5 passes for a model that remembers, and fails for one whose memory never stores the value.

The model is an induction head as models start out, made to say what it reads instead of what it sees.
"""

import dataclasses
from typing import Any

import pytest
import torch

from callbacks.niah_result import NIAHResult
from experiments.training_gates.needle_recall import PAIRS, needle_gate
from theria.memory import AssociativeMemory
from theria.memory.needle import draw_haystack, memory_branches, probe_memories
from theria.models.memory_lm import MemoryLM
from theria.models.needle_prompts import Share, make_prompts, needle_spec, probe_prompts
from theria.tasks.recall import RecallSpec, sample_recall

WIDTH = 256
SPEC = RecallSpec(max_pairs=8, first_key=32, num_keys=48, first_value=80, num_values=40, num_noise=32)


def remembering() -> MemoryLM:
    torch.manual_seed(0)
    model = MemoryLM(120, width=WIDTH, blocks=1, heads=4, window=4, memory_heads=1, memory_dim=WIDTH)
    (block,) = model.blocks
    with torch.no_grad():
        block.gate.linear.bias.fill_(6)
        block.mlp.w1.weight.zero_()
        block.o_proj.weight.copy_(20 * torch.eye(WIDTH))
    return model.eval()


def probed(model: MemoryLM, *, pairs: tuple[int, ...] = (10, PAIRS)) -> NIAHResult:
    def sample(spec: RecallSpec, ids: torch.Tensor, control: str) -> Any:
        return sample_recall(spec, ids, seed=0, epoch=0, stream="validation", control=control)[:3]

    spec = needle_spec(SPEC, length=96, reach=3, pairs=8, queries=4)
    prompts = make_prompts(sample, spec, prompts=16, controls=8, depths=2)
    haystack = draw_haystack(4, 1, max(pairs), WIDTH, seed=0)
    capacity = tuple(probe_memories(memory_branches(model), haystack, pairs=count) for count in pairs)
    return NIAHResult(1, capacity[0], capacity, probe_prompts(model, [prompts]), 0.0)


@pytest.fixture(scope="module")
def remembered() -> NIAHResult:
    return probed(remembering())


def test_it_passes_for_a_model_that_remembers(remembered):
    gate = needle_gate(remembered)
    assert gate.passed, gate
    for said in ("among 100 pairs", "of 64, chance 0.025", "memory off 0 of 32", "previous shard 0 of 32"):
        assert said in gate.measured


def test_a_memory_that_never_stores_the_value_fails(monkeypatch):
    honest = AssociativeMemory.forward

    def forgetful(self, q, k, v, **options):
        return honest(self, q, k, torch.zeros_like(v), **options)

    monkeypatch.setattr(AssociativeMemory, "forward", forgetful)
    found = probed(remembering())
    gate = needle_gate(found)
    assert not gate.passed
    assert found.capacity[-1].worst == 0
    assert found.prompts.accuracy.value < 0.2


def test_a_memory_that_stores_under_another_key_fails(monkeypatch):
    honest = AssociativeMemory.forward

    def confused(self, q, k, v, **options):
        return honest(self, q, k, v.roll(1, dims=2), **options)

    monkeypatch.setattr(AssociativeMemory, "forward", confused)
    assert not needle_gate(probed(remembering())).passed


def test_a_model_that_does_not_read_its_memory_fails(remembered):
    model = remembering()
    model.blocks[0].gate.linear.bias.data.fill_(-20)
    found = probed(model)
    assert found.capacity[-1].passes()
    assert not needle_gate(found).passed


def test_each_level_has_to_pass(remembered):
    level = remembered.capacity[-1]
    for changes in ({"worst": 0.79}, {"leaks": True}):
        capacity = (remembered.capacity[0], dataclasses.replace(level, **changes))
        assert not needle_gate(dataclasses.replace(remembered, capacity=capacity)).passed
    for name in remembered.prompts.controls:
        controls = {**remembered.prompts.controls, name: Share(12, 32)}
        leaking = dataclasses.replace(remembered.prompts, controls=controls)
        assert not needle_gate(dataclasses.replace(remembered, prompts=leaking)).passed


def test_it_is_judged_where_a_hundred_pairs_stand(remembered):
    """Whatever the configuration judges by: fewer pairs are easier."""
    easy = (remembered.capacity[0], dataclasses.replace(remembered.capacity[0], pairs=20))
    gate = needle_gate(dataclasses.replace(remembered, capacity=easy))
    assert not gate.passed
    assert "no needle among 100 pairs" in gate.measured
    assert not needle_gate(dataclasses.replace(remembered, prompts=None)).passed
