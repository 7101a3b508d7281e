"""Sums and figures of a language model's predictions against loops over single labels."""

import math

import pytest
import torch

from datamodules.packing import IGNORED, TextBatch
from lightning_modules.text_evaluation import EvaluationSums, batch_sums, bits_per_byte, perplexity
from theria.tasks.recall import RecallSpec, sample_recall

VOCAB = 30
SPEC = RecallSpec(
    length=40,
    min_pairs=3,
    max_pairs=5,
    queries=2,
    query_span=6,
    first_key=10,
    num_keys=12,
    first_value=22,
    num_values=8,
    num_noise=10,
)


def batch() -> TextBatch:
    """Two sequences of text, the second with labels left out, and two of recall."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(10, (2, 40), generator=generator)
    labels = torch.randint(10, (2, 40), generator=generator)
    labels[1, 25:] = IGNORED
    recall = sample_recall(SPEC, torch.arange(2), seed=0, epoch=0, stream="train")
    mask = torch.cat((torch.zeros(2, 40, dtype=torch.bool), recall.labels != IGNORED))
    return TextBatch(
        tokens=torch.cat((tokens, recall.tokens)),
        labels=torch.cat((labels, recall.labels)),
        segment_ids=torch.zeros(4, 40, dtype=torch.int64),
        recall_mask=mask,
        num_bytes=torch.tensor([70, 30, 0, 0]),
        source=torch.tensor([0, 0, 1, 1]),
        sample_ids=torch.arange(4),
    )


def logits(seed=0) -> torch.Tensor:
    return 3 * torch.randn(4, 40, VOCAB, generator=torch.Generator().manual_seed(seed))


def answering(given: TextBatch) -> torch.Tensor:
    """Logits that answer the queries of the first recall sequence only."""
    made = logits(1)
    made[2, given.recall_mask[2], given.labels[2, given.recall_mask[2]]] += 100
    wrong = (given.labels[3, given.recall_mask[3]] + 1) % VOCAB
    made[3, given.recall_mask[3], wrong] += 100
    return made


def test_sums_are_those_of_a_loop():
    given, made = batch(), logits()
    text = recall = labels = answers = correct = 0.0
    for row in range(4):
        for place in range(40):
            label = int(given.labels[row, place])
            if label == IGNORED:
                continue
            loss = -float(made[row, place].double().log_softmax(-1)[label])
            if given.recall_mask[row, place]:
                recall += loss
                answers += 1
                correct += int(made[row, place].argmax()) == label
            else:
                text += loss
                labels += 1
    sums = batch_sums(made, given)
    assert float(sums.text_loss) == pytest.approx(text, rel=1e-5)
    assert float(sums.recall_loss) == pytest.approx(recall, rel=1e-5)
    assert (int(sums.text_labels), int(sums.num_bytes)) == (labels, 100) == (65, 100)
    assert (int(sums.recall_labels), int(sums.recall_correct)) == (answers, correct)
    assert float(sums.lm_loss) == pytest.approx(text / labels, rel=1e-5)
    assert float(sums.mean_recall_loss) == pytest.approx(recall / answers, rel=1e-5)


def test_half_precision_is_summed_in_single():
    given, made = batch(), logits().bfloat16()
    assert batch_sums(made, given).text_loss == batch_sums(made.float(), given).text_loss


def test_only_the_losses_have_a_gradient_and_labels_left_out_give_none():
    given, made = batch(), logits().requires_grad_()
    sums = batch_sums(made, given)
    (gradient,) = torch.autograd.grad(sums.lm_loss + sums.mean_recall_loss, made)
    assert bool((gradient[given.labels == IGNORED] == 0).all())
    assert bool((gradient[given.labels != IGNORED].abs().sum(-1) > 0).all())


def test_a_batch_without_text_or_without_recall_has_a_loss_of_zero():
    given = batch()
    text = TextBatch(*(part[:2] for part in given))
    recall = TextBatch(*(part[2:] for part in given))
    assert float(batch_sums(logits()[:2], text).mean_recall_loss) == 0
    assert float(batch_sums(logits()[2:], recall).lm_loss) == 0


def test_bits_and_perplexity():
    assert float(bits_per_byte(torch.tensor(math.log(2) * 12), torch.tensor(4))) == pytest.approx(3)
    assert float(perplexity(torch.tensor(math.log(5)))) == pytest.approx(5)
    assert float(perplexity(torch.tensor(50.0))) == pytest.approx(math.exp(20), rel=1e-6)


def test_figures_over_two_batches_with_distances_and_the_memory_off():
    given = batch()
    first, second = answering(given), logits(2)
    queried = {(row, int(place)): None for row in (2, 3) for place in given.recall_mask[row].nonzero()[:, 0]}
    for row, place in queried:
        key = given.tokens[row, place]
        stored = next(at for at in range(40) if given.tokens[row, at] == key)
        queried[row, place] = place - stored - 1
    distances = sorted(queried.values())
    reach = distances[1]  # two answers inside and two beyond
    sums = EvaluationSums(reach, torch.device("cpu"))
    sums.add(first, given, off=second)
    sums.add(second, given, off=first)
    figures = {name: float(value) for name, value in sums.figures().items()}

    nats = float(batch_sums(first, given).text_loss + batch_sums(second, given).text_loss)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / 200)
    assert figures["bits_per_byte_memory_off"] == pytest.approx(figures["bits_per_byte"])
    assert figures["perplexity"] == pytest.approx(math.exp(nats / 130))

    def share(keep, made):
        return [
            int(m[row, place].argmax()) == int(given.labels[row, place])
            for m in made
            for (row, place), distance in queried.items()
            if keep(distance)
        ]

    for name, keep in (
        ("accuracy", lambda d: True),
        ("accuracy_inside", lambda d: d <= reach),
        ("accuracy_beyond", lambda d: d > reach),
    ):
        right = share(keep, (first, second))
        assert figures[name] == pytest.approx(sum(right) / len(right)), name
    assert figures["accuracy_memory_off"] == figures["accuracy"]
    assert 0 < figures["accuracy"] < 1
    assert figures["accuracy_inside"] != figures["accuracy_beyond"]


def test_figures_that_nothing_was_seen_of_are_left_out():
    given = batch()
    sums = EvaluationSums(1000, torch.device("cpu"))
    assert sums.figures() == {}
    sums.add(logits()[:2], TextBatch(*(part[:2] for part in given)))
    assert set(sums.figures()) == {"bits_per_byte", "perplexity"}
    sums.add(logits()[2:], TextBatch(*(part[2:] for part in given)))
    assert {"accuracy", "accuracy_inside"} <= set(sums.figures())
    assert not {"accuracy_beyond", "accuracy_memory_off"} & set(sums.figures())
