"""Second-order paths of a model are measured against the right Hessian, by magnitude."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from theria.attention import registered_backend, scaled_dot_product_attention
from theria.curvature import Case, probe_derivatives, relative_difference, second_order_path
from theria.curvature.convention import find_convention
from theria.maml import TaskModel
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

ATTENTION = ("q_proj", "k_proj", "v_proj")
SPEC = SeqClsSpec(length=6, width=8, num_classes=3, support_size=4, query_size=4)


@pytest.fixture
def support():
    return sample_tasks(SPEC, torch.arange(3), seed=1, epoch=0, stream="train")[:2]


def models(backend: str) -> tuple[SeqClassifier, SeqClassifier]:
    """A classifier over a backend, and the same in float64 over the reference."""
    torch.manual_seed(5)
    model = SeqClassifier(SPEC.width, SPEC.num_classes, backend="reference")
    reference = copy.deepcopy(model).double()
    model.backend = backend
    return model, reference


def broken(function):
    """A backend made of attention over (query, key, value)."""

    def backend(query, key, value, **_):
        return function(query, key, value)

    return registered_backend("broken", backend)


def reference_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, backend="reference")


@pytest.mark.parametrize("modules", [(*ATTENTION, "head"), ATTENTION, ("head",)])
def test_a_sound_attention_has_every_path_whole(support, modules):
    path = second_order_path(*models("custom"), support, modules=modules)
    assert path.magnitude == pytest.approx(1, abs=1e-5)
    assert path.exists
    assert set(path.surviving) == set(modules)
    assert all(share == pytest.approx(1, abs=1e-5) for share in path.surviving.values())


def test_a_detached_output_leaves_the_heads_path_alone(support):
    with broken(lambda q, k, v: reference_attention(q, k, v).detach() + 0 * (q + k.sum() + v.sum())):
        pair = models("broken")
        attention = second_order_path(*pair, support, modules=ATTENTION)
        head = second_order_path(*pair, support, modules=("head",))
        everything = second_order_path(*pair, support, modules=(*ATTENTION, "head"))
    assert attention.magnitude == 0
    assert not attention.exists
    assert attention.surviving == {"q_proj": 0, "k_proj": 0, "v_proj": 0}
    assert head.magnitude == pytest.approx(1, abs=1e-5)
    assert everything.exists
    assert everything.magnitude < 0.5


def test_a_magnitude_is_that_of_the_explicit_hessian(support):
    """Frozen probabilities, and both Hessians of the support loss as matrices."""
    with broken(lambda q, k, v: reference_attention(q.detach() + 0 * q, k.detach() + 0 * k, v)):
        model, reference = models("broken")
        support = (support[0].double(), support[1])
        path = second_order_path(model.double(), reference, support, modules=ATTENTION, seed=9)
        hessians = [_hessian(m, support) for m in (model, reference)]
    sizes = {name: p.numel() * 3 for name, p in model.named_parameters() if "proj" in name}
    generator = torch.Generator().manual_seed(9)
    shape = (3, SPEC.width, SPEC.width)
    u = torch.cat([torch.randn(shape, generator=generator).flatten() for _ in sizes]).double()
    found, expected = (h @ u for h in hessians)
    assert path.magnitude == pytest.approx((found.norm() / expected.norm()).item())
    assert path.kept == pytest.approx((found @ expected / expected.square().sum()).item())
    size = sizes["v_proj.weight"]
    shares = []
    for along in range(3):
        part = torch.zeros_like(u)
        part[along * size : (along + 1) * size] = u[along * size : (along + 1) * size]
        of_v, exact = ((h @ part)[2 * size :] for h in hessians)
        shares.append((of_v @ exact / exact.square().sum()).item())
    assert path.surviving["v_proj"] == pytest.approx(sum(shares) / 3)
    assert 0 < path.magnitude < 0.5
    assert path.surviving["q_proj"] == path.surviving["k_proj"] == 0


def _hessian(model: SeqClassifier, support: tuple[Tensor, Tensor]) -> Tensor:
    """Of the summed support loss by the attention's stacked parameters, all in one vector."""
    task_model = TaskModel(model)
    stacked, _ = task_model.initial(3)
    own = [i for i, name in enumerate(task_model.adapted_names) if "proj" in name]
    sizes = [stacked[i].numel() for i in own]

    def loss(flat: Tensor) -> Tensor:
        parameters = list(stacked)
        for i, part in zip(own, flat.split(sizes), strict=True):
            parameters[i] = part.view_as(stacked[i])
        return task_model.total_loss(parameters, [], support)[0]

    return torch.autograd.functional.hessian(loss, torch.cat([stacked[i].flatten() for i in own]))


def test_a_relative_difference_is_over_all_parameters_together():
    x = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0])}
    y = {"a": torch.tensor([0.0]), "b": torch.tensor([0.0, 4.0])}
    assert relative_difference(y, x) == pytest.approx(3 / 5)
    assert relative_difference(x, x) == 0
    assert relative_difference({"a": torch.zeros(1)}, {"a": torch.zeros(1)}) == 0


def test_a_probe_reports_refusal_failure_and_absence():
    def refuses(query, key, value, is_causal=False):
        if is_causal:
            raise NotImplementedError("no mask")
        return reference_attention(query, key, value)

    attention = find_convention(refuses).bind(refuses)
    refused = probe_derivatives(attention, Case(1, 1, 4, 4, 8, causal=True))
    assert refused.refused == "NotImplementedError: no mask"
    assert refused.deviations == {}
    assert refused.worst("forward") is None
    taken = probe_derivatives(attention, Case(1, 1, 4, 4, 8))
    assert taken.refused == ""
    assert taken.failure is None
    assert set(taken.surviving) == {"query", "key", "value", "cotangent"}


def test_an_input_counts_its_directions_alike():
    """Without the query's edge the key loses one of its three blocks, whatever their sizes."""

    def attend(query, key, value, *, is_causal=False):
        return reference_attention(query.detach() + 0 * query, key, value)

    for magnitude in (0.1, 1.0, 3.0):
        kept = probe_derivatives(attend, Case(1, 2, 9, 9, 16, magnitude=magnitude)).surviving
        assert kept["query"] == 0
        assert kept["key"] == pytest.approx(2 / 3, abs=1e-3)
        assert kept["value"] == pytest.approx(1 / 2, abs=1e-3)
        assert kept["cotangent"] == pytest.approx(2 / 3, abs=1e-3)


def test_inputs_without_curvature_are_not_judged():
    """Attention to one key is that key's value: nothing of second order is there to survive."""
    probe = probe_derivatives(partial(scaled_dot_product_attention, backend="custom"), Case(1, 2, 4, 1, 8))
    assert probe.surviving == {}
    assert all(d.of_allowed <= 1 for d in probe.deviations.values())
