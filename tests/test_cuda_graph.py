"""Captured functions: the same numbers as eager ones, and no stale memory."""

import gc
import subprocess
import sys

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_modules import training_forward
from lightning_modules.training_forward import TrainingForward
from theria.cuda_graph import CapturedFunction, CapturedTraining
from theria.maml import meta_gradient
from theria.models.memory_lm import MemoryLM
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


def small_decoder(**sizes):
    torch.manual_seed(0)
    given = {"width": 32, "blocks": 2, "heads": 2, "window": 8, "memory_heads": 2, "memory_dim": 16}
    return MemoryLM(40, **(given | sizes)).cuda().train()


def packed_batch():
    tokens = torch.randint(40, (3, 70), device="cuda")
    return tokens, torch.randint(2, (3, 70), device="cuda").cumsum(dim=1)


CAPTURED = """
import sys
import torch
import torch.nn.functional as F
from theria.cuda_graph import CapturedTraining
from theria.models.memory_lm import MemoryLM

device, compiled, kernel = sys.argv[1], sys.argv[2] == "compiled", sys.argv[3]
torch.manual_seed(0)
sizes = {"width": 32, "blocks": 2, "heads": 2, "window": 8, "memory_heads": 2, "memory_dim": 16}
model = MemoryLM(40, **sizes, kernel=kernel).to(device).train()
whole = torch.compile(model) if compiled else model
captured = None


def batch():
    ids = torch.randint(2, (3, 70), device=device).cumsum(dim=1)
    return torch.randint(40, (3, 70), device=device), ids


def function(tokens, ids):
    output = whole(tokens, segment_ids=ids)
    return output.logits, output.gates


def replayed(tokens, ids):
    global captured
    if captured is None:
        captured = CapturedTraining(function, (tokens, ids), list(model.parameters()))
    return captured(tokens, ids)


def losses_and_gradients(forward, batches):
    losses = []
    for tokens, ids in batches:
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            logits, gates = forward(tokens, ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()) + gates.square().mean()
        loss.backward()
        losses.append(loss.item())
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return losses, found


for _ in range(3):
    # two batches, whose gradients add up
    batches = [batch(), batch()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    expected_losses, expected = losses_and_gradients(function, batches)
    losses, found = losses_and_gradients(replayed if device == "cuda" else function, batches)
    assert losses == expected_losses, (losses, expected_losses)
    assert sum(g is not None and bool(g.abs().max() > 0) for g in expected) > 20
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other), (one - other).abs().max()
print("equal")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("forward", ["eager", "compiled"])
@pytest.mark.parametrize("kernel", ["auto", "tensor"])
def test_captured_training_equals_its_own_forward_and_backward(forward, kernel):
    """In a process of its own, without the annotations' checks, which would be traced."""
    done = subprocess.run(
        [sys.executable, "-c", CAPTURED, "cuda", forward, kernel], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.gpu
def test_dropout_is_new_at_every_replay_and_capturing_draws_nothing():
    model, batch = small_decoder(dropout=0.5), packed_batch()
    torch.cuda.manual_seed(7)
    eager = TrainingForward(model, compiled=False, cuda_graph="off")
    with torch.no_grad():
        expected = [eager(*batch)[0].clone() for _ in range(2)]
    torch.cuda.manual_seed(7)
    captured = TrainingForward(model, compiled=False, cuda_graph="on")
    found = [captured(*batch)[0].detach().clone() for _ in range(2)]
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], expected[0]), "the masks of a run that was not captured"


@pytest.mark.gpu
def test_another_shape_goes_without_the_graph():
    model = small_decoder(kernel="tensor")
    eager, captured = (TrainingForward(model, compiled=False, cuda_graph=g) for g in ("off", "on"))
    for length in (70, 40, 70):
        batch = tuple(t[:, :length].contiguous() for t in packed_batch())
        assert torch.equal(captured(*batch)[0], eager(*batch)[0])


@pytest.mark.gpu
def test_captured_training_is_of_first_order_and_of_its_parameters_place():
    weight = torch.nn.Parameter(torch.full((3,), 2.0, device="cuda"))
    captured = CapturedTraining(lambda x: (x * weight.square(),), [torch.ones(3, device="cuda")], [weight])
    (result,) = captured(torch.arange(3.0, device="cuda"))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(result.sum(), weight, create_graph=True)
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    assert gradient.tolist() == [0.0, 4.0, 8.0]
    with pytest.raises(ValueError, match="captured for"):
        captured(torch.ones(2, device="cuda"))
    weight.data = weight.data.clone()
    with pytest.raises(ValueError, match="a parameter moved"):
        captured(torch.ones(3, device="cuda"))


def test_a_graph_that_cannot_be_is_refused_where_it_is_demanded():
    torch.manual_seed(0)
    model = MemoryLM(40, width=16, blocks=1, heads=2, window=4, memory_heads=1, memory_dim=8)
    batch = torch.randint(40, (1, 6)), torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(MisconfigurationException, match="cuda_graph is on, but the batch is on cpu"):
        TrainingForward(model, compiled=False, cuda_graph="on")(*batch)
    logits, gates = TrainingForward(model, compiled=False, cuda_graph="auto")(*batch)
    assert torch.equal(logits, model(batch[0], segment_ids=batch[1]).logits)
    assert gates is not None
    with pytest.raises(ValueError, match="needs its inputs on a CUDA device"):
        CapturedTraining(lambda x: (x,), [torch.zeros(1)], [])


@pytest.mark.parametrize(
    ("failure", "raised", "said"),
    [
        (
            RuntimeError("stream is capturing"),
            MisconfigurationException,
            "stream is capturing; model.init_args",
        ),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "^no memory$"),
    ],
)
def test_a_capture_that_fails_says_how_to_do_without(monkeypatch, failure, raised, said):
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(training_forward, "CapturedTraining", fail)
    monkeypatch.setattr(TrainingForward, "_to_be_captured", lambda *_: True)
    model = MemoryLM(40, width=16, blocks=1, heads=2, window=4, memory_heads=0)
    forward = TrainingForward(model, compiled=False, cuda_graph="auto")
    with pytest.raises(raised, match=said):
        forward(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64))
