"""Persistent memory: what it is, that it learns, and that a checkpoint restores it."""

import io
import re

import pytest
import torch

from theria.memory import PersistentMemory, causal_projection


def test_both_parts_are_moments_of_the_vectors():
    torch.manual_seed(0)
    memory = PersistentMemory(3, 5).double()
    vectors = memory.vectors.detach()
    assert vectors.shape == (64, 3, 5)
    for head in range(3):
        outer = sum(torch.outer(p, p) for p in vectors[:, head])
        torch.testing.assert_close(memory.m_persistent[head], outer)
        torch.testing.assert_close(memory.norm_persistent[head], outer.trace())


def test_the_vectors_start_as_specified():
    torch.manual_seed(0)
    vectors = PersistentMemory(8, 256).vectors
    assert vectors.std().item() == pytest.approx(0.02, rel=0.01)
    assert vectors.mean().item() == pytest.approx(0, abs=3e-4)


@pytest.mark.parametrize("part", ["m_persistent", "norm_persistent"])
def test_the_vectors_learn_through_either_part(part):
    torch.manual_seed(0)
    memory = PersistentMemory(2, 4, slots=3).double()
    q, k = torch.randn(2, 1, 2, 6, 4).double()
    parts = {"m_persistent": memory.m_persistent, "norm_persistent": memory.norm_persistent}
    other = next(name for name in parts if name != part)
    parts[other] = parts[other].detach()
    projected, _ = causal_projection(q, k, **parts)
    (gradient,) = torch.autograd.grad(projected.square().sum(), memory.vectors)
    assert (gradient.abs() > 0).all()


def test_the_vectors_gradient_against_finite_differences():
    torch.manual_seed(0)
    memory = PersistentMemory(2, 3, slots=2).double()
    q, k = torch.randn(2, 1, 2, 4, 3).double()

    def project(vectors):
        memory.vectors.data = vectors.detach()
        parts = torch.func.functional_call(_Parts(memory), {"memory.vectors": vectors}, ())
        return causal_projection(q, k, *parts, segment_ids=torch.tensor([[0, 0, 1, 1]]))[0]

    assert torch.autograd.gradcheck(project, (memory.vectors.detach().clone().requires_grad_(),))


class _Parts(torch.nn.Module):
    def __init__(self, memory: PersistentMemory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self):
        return self.memory.m_persistent, self.memory.norm_persistent


def test_a_checkpoint_restores_both_parts_bit_for_bit():
    torch.manual_seed(0)
    memory, other = PersistentMemory(2, 8), PersistentMemory(2, 8)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.m_persistent, memory.m_persistent)
    assert torch.equal(other.norm_persistent, memory.norm_persistent)


def test_both_parts_are_float32_under_autocast_and_for_half_vectors():
    torch.manual_seed(0)
    memory = PersistentMemory(2, 8)
    expected = memory.m_persistent
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memory.m_persistent, expected)
        assert memory.norm_persistent.dtype == torch.float32
    assert memory.bfloat16().m_persistent.dtype == torch.float32


@pytest.mark.parametrize("name", ["heads", "dim", "slots"])
@pytest.mark.parametrize("size", [0, True])
def test_sizes_are_positive_integers(name, size):
    sizes = {"heads": 2, "dim": 3, "slots": 4, name: size}
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a positive integer, received {size}")):
        PersistentMemory(sizes["heads"], sizes["dim"], slots=sizes["slots"])
