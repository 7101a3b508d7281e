"""What a language model's predictions are worth: sums over batches, and the figures that follow from them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from datamodules.packing import IGNORED, TextBatch
from theria.tasks.recall import answer_distances

LARGEST_EXPONENT = 20.0
"""Losses above it have the perplexity of it, which a float32 still holds."""


class BatchSums(NamedTuple):
    """Sums over the labels of a batch, each a scalar tensor on its device.

    Attributes:
        text_loss: nats over the labels of text.
        text_labels: how many they are,
        num_bytes: and the bytes they stand for.
        recall_loss: nats over the answers of associative recall.
        recall_labels: how many they are,
        recall_correct: and how many of them are the likeliest token.
    """

    text_loss: Tensor
    text_labels: Tensor
    num_bytes: Tensor
    recall_loss: Tensor
    recall_labels: Tensor
    recall_correct: Tensor

    @property
    def lm_loss(self) -> Tensor:
        """Nats a label of text; 0 where there is none."""
        return self.text_loss / self.text_labels.clamp_min(1)

    @property
    def mean_recall_loss(self) -> Tensor:
        """Nats an answer; 0 where there is none."""
        return self.recall_loss / self.recall_labels.clamp_min(1)

    def over_ranks(self) -> "BatchSums":
        """The same over the batches of all W ranks, differentiating as W times this rank's own.

        Ranks have different numbers of labels. With these sums every rank has the loss over all labels, and
        the mean over ranks of its gradients, which their engine takes, is its gradient.
        """
        total = torch.stack([value.detach().double() for value in self])
        distributed.all_reduce(total)
        ranks = distributed.get_world_size()
        return BatchSums(
            *(
                value.to(own.dtype) + (ranks * (own - own.detach()) if own.requires_grad else 0)
                for own, value in zip(self, total, strict=True)
            )
        )


def batch_sums(logits: Tensor, batch: TextBatch) -> BatchSums:
    """The sums for ``logits`` (batch, length, vocab), in float32 at least; the losses keep their graph."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        batch.labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    ).view_as(batch.labels)
    # ignored labels have a loss of exactly zero
    recall_loss = losses.masked_fill(~batch.recall_mask, 0).sum()
    text = (batch.labels != IGNORED) & ~batch.recall_mask
    return BatchSums(
        text_loss=losses.masked_fill(batch.recall_mask, 0).sum(),
        text_labels=text.sum(),
        num_bytes=batch.num_bytes.sum(),
        recall_loss=recall_loss,
        recall_labels=batch.recall_mask.sum(),
        recall_correct=correct_answers(logits, batch).sum(),
    )


def correct_answers(logits: Tensor, batch: TextBatch) -> Tensor:
    """(batch, length), True at answers that are the likeliest token."""
    return batch.recall_mask & (logits.detach().argmax(dim=-1) == batch.labels)


def bits_per_byte(nats: Tensor, num_bytes: Tensor) -> Tensor:
    """Nats over the text of so many bytes as bits a byte."""
    return nats / math.log(2) / num_bytes.clamp_min(1)


def perplexity(loss: Tensor) -> Tensor:
    """exp(min(loss, 20))."""
    return loss.clamp(max=LARGEST_EXPONENT).exp()


_TEXT = ("nats", "labels", "bytes")
_RECALL = ("answers", "correct", "inside", "correct_inside", "beyond", "correct_beyond", "off", "correct_off")
_TEXT_OFF = ("nats_off", "bytes_off")
_COLUMNS = (*_TEXT, *_RECALL, *_TEXT_OFF)


class EvaluationSums:
    """Sums over the batches of one loader in float64, and the figures of a whole pass.

    Args:
        reach: tokens that attention alone reaches back; answers stored farther back are "beyond" it.
        device: of the sums.
    """

    def __init__(self, reach: int, device: torch.device) -> None:
        self.reach = reach
        self.sums = torch.zeros(len(_COLUMNS), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, batch: TextBatch, *, off: Tensor | None = None) -> None:
        """Add a batch's logits, and those of the same weights with the memory switched off."""
        sums = batch_sums(logits, batch)
        correct = correct_answers(logits, batch)
        distance = answer_distances(batch.tokens, batch.labels.where(batch.recall_mask, IGNORED))
        inside, beyond = (distance >= 0) & (distance <= self.reach), distance > self.reach
        row = [sums.text_loss, sums.text_labels, sums.num_bytes, sums.recall_labels, sums.recall_correct]
        for part in (inside, beyond):
            row += [part.sum(), (part & correct).sum()]
        control = [sums.text_loss.new_zeros(())] * 4
        if off is not None:
            without = batch_sums(off, batch)
            control = [without.recall_labels, without.recall_correct, without.text_loss, without.num_bytes]
        self.sums += torch.stack([value.detach().double() for value in (*row, *control)])

    def figures(self) -> dict[str, Tensor]:
        """Figures by name, those alone that the labels seen allow."""
        total = dict(zip(_COLUMNS, self.sums, strict=True))
        found = {}
        if total["bytes"] > 0:
            found["bits_per_byte"] = bits_per_byte(total["nats"], total["bytes"])
            found["perplexity"] = perplexity(total["nats"] / total["labels"])
        if total["bytes_off"] > 0:
            found["bits_per_byte_memory_off"] = bits_per_byte(total["nats_off"], total["bytes_off"])
        for name, count, correct in (
            ("accuracy", "answers", "correct"),
            ("accuracy_inside", "inside", "correct_inside"),
            ("accuracy_beyond", "beyond", "correct_beyond"),
            ("accuracy_memory_off", "off", "correct_off"),
        ):
            if total[count] > 0:
                found[name] = total[correct] / total[count]
        return found
