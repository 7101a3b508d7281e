"""The decoder under torch.compile: the same numbers, in parts between what a compiler does not trace."""

import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torch._dynamo.utils import counters
from theria.models.memory_lm import MemoryLM

torch._dynamo.config.error_on_recompile = True
torch.manual_seed(0)
lm = MemoryLM(40, width=24, blocks=3, heads=2, window=5, memory_heads=3, memory_dim=6, chunk_size=8)
tokens, ids = torch.randint(40, (2, 70)), torch.arange(70).floor_divide(30).expand(2, -1).contiguous()
results = []
for forward in (lm, torch.compile(lm, backend="aot_eager")):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = forward(tokens, segment_ids=ids).logits.float().square().mean()
    results.append((loss, *torch.autograd.grad(loss, list(lm.parameters()))))
for eager, compiled in zip(*results, strict=True):
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-7)
assert counters["stats"]["unique_graphs"] > 3
for reason in counters["graph_break"]:
    assert "torch.compiler.disable" in reason, reason
"""


def test_compiled_parts_agree_and_are_shared_by_all_blocks():
    """In a process of its own, without the annotations' checks, which would be traced."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=300)


RAGGED = """
import torch
from theria.memory import PersistentMemory, QKProjection

torch.manual_seed(0)
projection = QKProjection(PersistentMemory(2, 8))
q, k = (torch.nn.functional.normalize(torch.randn(3, 2, 70, 8), dim=-1) for _ in range(2))
ids = torch.randint(2, (3, 70)).cumsum(dim=1)
results = []
for forward in (projection, torch.compile(projection)):
    read = forward(q, k, segment_ids=ids)[0]
    results.append((read, *torch.autograd.grad(read.square().sum(), list(projection.parameters()))))
for eager, compiled in zip(*results, strict=True):
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_a_length_of_no_whole_chunks_is_compiled_right():
    """Inductor itself reads memory nobody wrote where such a length is traced."""
    subprocess.run([sys.executable, "-c", RAGGED], check=True, timeout=300)
