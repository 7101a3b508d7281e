"""MAML through a callable: the same numbers as theria.maml, and nothing left behind."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from theria.attention import available_backends, register_backend, scaled_dot_product_attention
from theria.attention import registry as attention_registry
from theria.curvature import Convention, MetaTask, Status, probe_learning, relative_difference
from theria.curvature.learning import SMALL_TASK
from theria.maml import meta_gradient
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

REFERENCE = partial(scaled_dot_product_attention, backend="reference")
SPEC = SeqClsSpec(length=6, width=8, num_classes=3, support_size=4, query_size=4)
TASK = MetaTask(SPEC, tasks=3, inner_lr=0.3, outer_lr=0.05)


def detached(query, key, value, *, is_causal=False):
    out = REFERENCE(query, key, value, is_causal=is_causal)
    return out.detach() + 0 * out


def test_every_number_is_that_of_a_plain_loop():
    """Two outer steps of a detached attention, along the reference's path."""
    probe = probe_learning(detached, inner_steps=2, steps=2, task=TASK, seed=4)
    generator_state = torch.get_rng_state()
    torch.manual_seed(4)
    master = SeqClassifier(SPEC.width, SPEC.num_classes, backend="reference")
    torch.set_rng_state(generator_state)
    adam = torch.optim.Adam(master.parameters(), lr=0.05)
    register_backend("detached", lambda q, k, v, **_: detached(q, k, v))
    try:
        for step, found in enumerate(probe.probes):
            batch = sample_tasks(SPEC, torch.arange(3 * step, 3 * step + 3), seed=4, epoch=0, stream="train")
            gradients = {}
            for backend, dtype in (("detached", torch.float32), ("reference", torch.float64)):
                model = copy.deepcopy(master).to(dtype)
                model.backend = backend
                sets = [(batch[i].to(dtype), batch[i + 1]) for i in (0, 2)]
                for mode in ("FULL", "FO"):
                    gradients[backend, mode] = meta_gradient(
                        model, *sets, mode=mode, inner_steps=2, inner_lr=0.3
                    ).grads
            full, first = gradients["detached", "FULL"], gradients["detached", "FO"]
            right, right_first = gradients["reference", "FULL"], gradients["reference", "FO"]
            assert found.rel_diff == pytest.approx(relative_difference(first, full), rel=1e-5)
            assert found.reference_rel_diff == pytest.approx(
                relative_difference(right_first, right), rel=1e-6
            )
            assert found.full_error == pytest.approx(relative_difference(full, right), rel=1e-5)
            assert found.first_order_error == pytest.approx(relative_difference(first, right_first), rel=1e-5)
            for name, parameter in master.named_parameters():
                parameter.grad = right[name].float()
            adam.step()
    finally:
        del attention_registry._registered["detached"]
    assert len(probe.probes) == 2
    assert probe.rel_diff_mean == pytest.approx(sum(p.rel_diff for p in probe.probes) / 2)
    assert probe.failure is None


def test_a_sound_attention_makes_the_references_meta_gradient():
    probe = probe_learning(REFERENCE, inner_steps=3, steps=2, task=TASK)
    for step in probe.probes:
        assert step.full_error < 1e-5
        assert step.first_order_error < 1e-5
        assert step.rel_diff == pytest.approx(step.reference_rel_diff, rel=1e-4)
        assert step.rel_diff > 0.01
        assert all(path.exists for path in step.paths.values())


def test_steps_differ_and_seeds_decide():
    first, again, other = (
        probe_learning(REFERENCE, inner_steps=1, steps=2, task=TASK, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.probes[0].rel_diff != first.probes[1].rel_diff
    assert first.probes[0].rel_diff != other.probes[0].rel_diff


def test_backends_and_random_numbers_are_left_as_they_were():
    def breaks(query, key, value, *, is_causal=False):
        if query.requires_grad:
            raise KeyboardInterrupt
        return REFERENCE(query, key, value, is_causal=is_causal)

    before, state = available_backends(), torch.get_rng_state()
    probe_learning(REFERENCE, inner_steps=1, steps=1, task=TASK)
    with pytest.raises(KeyboardInterrupt):
        probe_learning(breaks, inner_steps=1, steps=1, task=TASK)
    assert available_backends() == before
    assert torch.equal(torch.get_rng_state(), state)


class WithoutVmap(Function):
    """The reference behind a function that has no vmap rule and keeps its context in forward."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return REFERENCE(query, key, value)

    @staticmethod
    def backward(ctx, cotangent):
        leaves = [t if t.requires_grad else t.requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = REFERENCE(*leaves)
            return torch.autograd.grad(out, leaves, cotangent, create_graph=True)


def test_a_callable_needs_no_vmap_rule():
    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        return WithoutVmap.apply(query, key, value)

    probe = probe_learning(attend, inner_steps=2, steps=1, task=TASK)
    assert probe.failure is None
    assert probe.probes[0].full_error < 1e-5


def test_errors_end_it_with_their_order():
    def cut(query, key, value, *, is_causal=False):
        with torch.no_grad():
            return REFERENCE(query, key, value)

    def refuses(query, key, value, *, is_causal=False):
        raise RuntimeError("no kernel for this")

    found = probe_learning(cut, inner_steps=1, steps=2, task=TASK)
    assert (found.failure.order, found.failure.status) == (1, Status.HARD_FAIL_UNUSED)
    assert found.probes == ()
    assert found.rel_diff_mean != found.rel_diff_mean
    found = probe_learning(refuses, inner_steps=1, steps=2, task=TASK)
    assert (found.failure.order, found.failure.error) == (0, "RuntimeError: no kernel for this")


def test_a_callable_for_squares_alone_is_given_squares():
    """The query repeated, and the last row read: it sees every key, under a causal mask too."""

    def square(query, key, value, *, is_causal=False):
        if query.shape != key.shape:
            raise ValueError("as many queries as keys")
        return REFERENCE(query, key, value, is_causal=is_causal)

    plain = probe_learning(REFERENCE, inner_steps=1, steps=1, task=TASK)
    for convention in (Convention(), Convention(always_causal=True)):
        found = probe_learning(square, inner_steps=1, steps=1, task=TASK, convention=convention)
        assert found.expanded
        assert found.probes[0].rel_diff == pytest.approx(plain.probes[0].rel_diff, rel=1e-5)
        assert found.probes[0].full_error < 1e-5
    assert not plain.expanded


def test_half_precision_keeps_its_paths():
    probe = probe_learning(REFERENCE, inner_steps=1, steps=2, task=SMALL_TASK, dtype=torch.bfloat16)
    for step in probe.probes:
        for path in step.paths.values():
            assert path.magnitude == pytest.approx(1, abs=0.05)
            assert all(share == pytest.approx(1, abs=0.05) for share in path.surviving.values())
