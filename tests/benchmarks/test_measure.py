"""What the benchmarks report: memory, growth, and the memory that the strategies promise."""

import pytest
import torch

from benchmarks.measure import peak_bytes, seconds_in_turns
from benchmarks.report import fitted_exponent, markdown_table
from theria.maml import meta_gradient
from theria.models.seq_classifier import SeqClassifier

# the profiler says when it starts and stops
pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA rounds allocations up")


@on_cpu
def test_peak_counts_what_is_held_at_once():
    def two_then_one() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a, b
        torch.empty(1200, dtype=torch.uint8)

    assert peak_bytes(two_then_one) == 1500


def test_exponents_are_slopes_in_logarithms():
    assert fitted_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_contenders_take_turns():
    calls: list[str] = []
    found = seconds_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert found.keys() == {"a", "b"}


def test_tables_are_markdown():
    assert markdown_table(["x", "y"], [["1", "2"]]) == ["| x | y |", "| --- | --- |", "| 1 | 2 |"]


def peak_of(steps: int, **way: object) -> int:
    """Peak bytes of a FULL meta-gradient."""
    torch.manual_seed(0)
    model = SeqClassifier(16, 3, backend="reference")
    support = torch.randn(8, 8, 24, 16), torch.randint(3, (8, 8))
    return peak_bytes(
        lambda: meta_gradient(model, support, support, mode="FULL", inner_steps=steps, inner_lr=0.4, **way)
    )


@on_cpu
def test_sweep_keeps_one_set_of_parameters_a_task_and_step():
    parameters = sum(p.numel() for p in SeqClassifier(16, 3).parameters())
    slope = (peak_of(20, strategy="sweep") - peak_of(4, strategy="sweep")) / 16
    # blocks are rounded up to the allocator's 64 bytes
    assert slope == pytest.approx(8 * parameters * 4, rel=0.02)
    assert peak_of(20) - peak_of(4) > 3 * 16 * slope


@on_cpu
def test_segments_cost_memory_with_the_square_root_of_the_steps():
    assert peak_of(64, inner_checkpoint=8) < 2.2 * peak_of(16, inner_checkpoint=4)
    assert peak_of(64) > 3.5 * peak_of(16)
