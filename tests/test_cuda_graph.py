"""Captured functions: the same numbers as eager ones, and no stale memory."""

import gc

import pytest
import torch

from theria.cuda_graph import CapturedFunction
from theria.maml import meta_gradient
from theria.models.seq_classifier import SeqClassifier


def test_inputs_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match=r"needs its inputs on a CUDA device, got \['cpu'\]"):
        CapturedFunction(torch.neg, [torch.zeros(1)])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["FULL", "FO", "FO_STRICT"])
@pytest.mark.parametrize("strategy", ["unrolled", "sweep"])
def test_replays_equal_eager_calls_with_new_tasks_and_new_parameters(mode, strategy):
    torch.manual_seed(0)
    model = SeqClassifier(8, 3, backend="reference").cuda()

    def compute(x, y, query_x, query_y):
        return meta_gradient(
            model, (x, y), (query_x, query_y), mode=mode, inner_steps=3, inner_lr=0.4, strategy=strategy
        )

    def draw():
        x, query_x = torch.randn(2, 4, 5, 6, 8, device="cuda")
        return x, torch.randint(3, (4, 5), device="cuda"), query_x, torch.randint(3, (4, 5), device="cuda")

    captured = CapturedFunction(compute, draw(), list(model.parameters()))
    for _ in range(3):
        tasks = draw()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        replayed, eager = captured(*tasks), compute(*tasks)
        assert torch.equal(replayed.loss, eager.loss)
        assert all(torch.equal(replayed.grads[name], g) for name, g in eager.grads.items())


@pytest.mark.gpu
def test_moved_parameters_and_other_shapes_are_refused():
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    captured = CapturedFunction(lambda x: x * weight.detach(), [torch.ones(3, device="cuda")], [weight])
    with pytest.raises(ValueError, match=r"captured for .*\(3,\).* got .*\(2,\)"):
        captured(torch.ones(2, device="cuda"))
    weight.data = weight.data.clone()
    with pytest.raises(ValueError, match="a parameter moved after the capture"):
        captured(torch.ones(3, device="cuda"))


@pytest.mark.gpu
def test_graphs_that_became_garbage_do_not_disturb_a_capture():
    class Owner:
        def __init__(self) -> None:
            self.captured = CapturedFunction(torch.neg, [torch.ones(3, device="cuda")])
            self.itself = self

    def allocating(x):
        for _ in range(5000):
            [[] for _ in range(10)]
        return x + 1

    thresholds = gc.get_threshold()
    try:
        gc.set_threshold(10, 1, 1)
        for _ in range(3):
            Owner()
            x = torch.ones(3, device="cuda")
            assert torch.equal(CapturedFunction(allocating, [x])(x), x + 1)
    finally:
        gc.set_threshold(*thresholds)
