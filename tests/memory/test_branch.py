"""The memory branch against its equations, one token at a time in float64."""

import pytest
import torch
import torch.nn.functional as F

from theria.memory import MemoryBranch, PersistentMemory

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def branch(rule="delta", taps=3, **changes):
    torch.manual_seed(0)
    sizes = {"heads": 2, "dim": 5, "slots": 3, "chunk_size": 4, "kernel": "tensor"}
    built = MemoryBranch(8, rule=rule, taps=taps, **(sizes | changes)).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def stated(built, x, segment_ids):
    """The branch's output by its equations, over single tokens of single sequences and heads."""
    heads, dim = built.heads, built.projection.dim
    out = torch.zeros_like(x)
    m_persistent = built.projection.persistent.m_persistent
    norm_persistent = built.projection.persistent.norm_persistent
    for b in range(len(x)):
        for t in range(x.shape[1]):
            begin = next(s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t])
            reads = []
            for h in range(heads):
                M, norm, S = m_persistent[h], norm_persistent[h], torch.zeros(dim, dim).double()
                for i in range(begin, t + 1):
                    mixed = sum(
                        built.conv.weight[j] * (built.in_proj.weight @ x[b, i - j])
                        for j in range(built.conv.taps)
                        if i - j >= begin
                    )
                    q, k, v = mixed.view(3, heads, dim)[:, h]
                    q, k = (part / (part @ part + 1e-6).sqrt() for part in (q, k))
                    M, norm = M + torch.outer(k, k), norm + k @ k
                    write = torch.ones(()).double()
                    if built.beta is not None:
                        write = torch.sigmoid(built.beta(x[b, i])[h])
                    if built.decay is not None:
                        S = S * torch.sigmoid(built.decay(x[b, i])[h] + 4) ** (1 / 16)
                    kept = S - write * torch.outer(S @ k, k) if built.beta is not None else S
                    S = kept + write * torch.outer(v, k)
                projected = built.projection.scale[h] * (M @ q) / norm
                share = torch.sigmoid(built.share_logit[h])
                read = S @ ((1 - share) * q + share * projected)
                reads.append(read / (1 + (read @ read) / dim / 16).sqrt())
            y = built.o_proj(torch.cat(reads))
            mlp = built.atlas.mlp
            out[b, t] = y + mlp.w1(F.silu(mlp.w2(y)) * mlp.w3(y))
    return out


@pytest.mark.parametrize("rule", ["hebbian", "delta", "gated_delta"])
def test_it_is_what_its_equations_say(rule):
    built = branch(rule)
    x = torch.randn(2, 9, 8).double()
    segment_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0] * 9])
    with torch.no_grad():
        expected = stated(built, x, segment_ids)
    torch.testing.assert_close(built(x, segment_ids=segment_ids)[0], expected, **CLOSE)


def test_the_share_starts_small_and_learns():
    built = branch()
    fresh = MemoryBranch(8, heads=2, dim=5, slots=3, rule="delta", taps=3, chunk_size=4, kernel="tensor")
    torch.testing.assert_close(fresh.share, torch.full((2,), 0.0474), rtol=1e-3, atol=0)
    built(torch.randn(2, 9, 8).double())[0].square().sum().backward()
    assert bool((built.share_logit.grad != 0).all())
    assert bool((built.projection.persistent.vectors.grad != 0).any())


def test_the_norm_of_the_persistent_memory_changes_what_is_said(monkeypatch):
    built, x = branch(), torch.randn(1, 6, 8).double()
    before, original = built(x)[0], PersistentMemory.norm_persistent.fget
    monkeypatch.setattr(PersistentMemory, "norm_persistent", property(lambda self: original(self) + 1))
    assert not torch.allclose(built(x)[0], before)
