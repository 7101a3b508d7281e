"""What the scores say of training: steps on one sample and the loss of another."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import VOCAB, build, class_loss
from scipy.stats import spearmanr

from theria.interference import Ridge, compute, detect_layout
from theria.models.memory_lm import MemoryLM

RIDGE = Ridge("relative", 1e-2)


def sequence_loss(model, tokens):
    return F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:])


def trained_language_model():
    """Counting up and counting down: the two tasks ask the same heads for different next tokens."""
    torch.manual_seed(0)
    model = MemoryLM(VOCAB, width=16, blocks=2, heads=2, window=6, memory_heads=0).double()
    starts = torch.arange(40)
    up, down = ((starts[:, None] + sign * torch.arange(8)) % VOCAB for sign in (1, -1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        drawn = torch.cat((up, down))[torch.randperm(80, generator=torch.Generator().manual_seed(step))[:16]]
        optimizer.zero_grad()
        F.cross_entropy(model(drawn).logits[:, :-1].flatten(0, 1), drawn[:, 1:].flatten()).backward()
        optimizer.step()
    return model, sequence_loss, list(up[:6]), list(down[8:14])


def trained_classifier():
    torch.manual_seed(0)
    model = build("seq_classifier")
    prototypes = torch.randn(3, 6).double()

    def draw(count, noise):
        labels = torch.arange(count) % 3
        return [(prototypes[y] + noise * torch.randn(5, 6).double(), y) for y in labels]

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        sum(class_loss(model, sample) for sample in draw(12, 1.0)).backward()
        optimizer.step()
    return model, class_loss, draw(8, 1.0), draw(8, 2.0)


def preconditioned_steps(model, loss_fn, samples_a, slices, size):
    """For each sample the change of the slices by -size g / (I + ridge), the ridge from whole blocks."""
    whole = []
    for sample in samples_a:
        found = torch.autograd.grad(loss_fn(model, sample), [parameter for parameter, _, _ in slices])
        whole.append([by_head(g) for g, (_, by_head, _) in zip(found, slices, strict=True)])
    fishers = [sum(g.square() for g in of_slice) / len(whole) for of_slice in zip(*whole, strict=True)]
    return [
        [
            -size * g[head] / (fisher[head] + RIDGE.strength * fisher.mean())
            for g, fisher, (_, _, head) in zip(own, fishers, slices, strict=True)
        ]
        for own in whole
    ]


def changed_losses(model, loss_fn, samples_b, slices, step):
    """Losses after adding a step to the slices, which are put back."""
    before = [p.detach().clone() for p, _, _ in slices]
    with torch.no_grad():
        for (parameter, by_head, head), delta in zip(slices, step, strict=True):
            places = by_head(torch.arange(parameter.numel()).view(parameter.shape).double())[head].long()
            parameter.view(-1)[places.flatten()] += delta.flatten()
        found = [float(loss_fn(model, sample)) for sample in samples_b]
        for (parameter, _, _), saved in zip(slices, before, strict=True):
            parameter.copy_(saved)
    return found


@pytest.mark.parametrize("make", [trained_language_model, trained_classifier])
def test_the_signed_score_predicts_what_a_step_on_one_sample_does_to_another(make):
    model, loss_fn, samples_a, samples_b = make()
    result = compute(
        model, loss_fn, samples_a, samples_b, ridge=RIDGE, variants=("signed",), min_samples_for_fisher=1
    )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        at_rest = np.array([float(loss_fn(model, sample)) for sample in samples_b])

    def correlation(chosen):
        slices = [
            (parameters[f"{projection.module}.weight"], projection.weight_by_head, head)
            for _, _, head, projection in chosen
        ]
        steps = preconditioned_steps(model, loss_fn, samples_a, slices, 1e-6)
        change = (
            np.array([changed_losses(model, loss_fn, samples_b, slices, step) for step in steps]) - at_rest
        )
        predicted = -sum(
            result.scores["signed"][block][:, :, layer, head] for layer, block, head, _ in chosen
        )
        return spearmanr(predicted.ravel(), change.ravel()).statistic, predicted

    every = [
        (layer, block, head, projection)
        for layer, found in enumerate(detect_layout(model))
        for block, projection in found.projections.items()
        for head in range(projection.heads)
    ]
    for chosen in every:
        rank, _ = correlation([chosen])
        assert rank > 0.9, chosen[:3]
    together, predicted = correlation(every)
    assert together > 0.9
    # some steps help and some hurt, so that the sign is put to the test
    assert (predicted > 0).any()
    assert (predicted < 0).any()


def test_tasks_in_conflict_have_more_negative_scores_than_one_task_with_itself():
    model, loss_fn, up, down = trained_language_model()
    options = {"variants": ("signed",), "min_samples_for_fisher": 1, "blocks": "O"}
    across = compute(model, loss_fn, up[:4], down[:4], **options)
    within = compute(model, loss_fn, up[:4], up[4:], **options)
    for layer, head in itertools.product(range(2), range(2)):
        found, expected = (result.diagnostics["O"].negative_share[layer, head] for result in (across, within))
        assert found >= expected
    assert across.layer_head_avg("signed", "O").sum() < within.layer_head_avg("signed", "O").sum()
