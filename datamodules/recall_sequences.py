"""Associative recall in a data module: its settings, its sequences among text, and its controls."""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loader import BatchIndex
from datamodules.packing import IGNORED, TextBatch, TokenStream, cut_windows
from datamodules.random_words import Purpose, random_words, scaled
from datamodules.shares import pick
from theria.tasks.recall import RecallSpec, sample_recall
from theria.tasks.synthetic_seqcls import Stream

Control = Literal["none", "never_stored", "previous_shard"]

CONTROLS: tuple[Control, ...] = ("never_stored", "previous_shard")
"""Recall that no model can answer: keys without a pair, and pairs behind a shard boundary."""


@dataclasses.dataclass(frozen=True)
class Recall:
    """Associative-recall sequences among the text.

    Attributes:
        share: of the training sequences, in [0, 1].
        filler: what stands between pairs and queries, "text" or "noise".
        min_pairs: pairs of a key and a value in a sequence, at least,
        max_pairs: and at most.
        queries: keys asked for in a sequence.
        query_span: last tokens of a sequence, among which the queries stand.
        min_distance: tokens between a stored value and any query, at least. Attention alone reaches back
            blocks x (window - 1).
        num_keys: tokens that are keys.
        num_values: tokens that are values; guessing is right once in so many.
        num_val_sequences: of validation and of each test loader.
    """

    share: float = 0.25
    filler: Literal["text", "noise"] = "text"
    min_pairs: int = 8
    max_pairs: int = 64
    queries: int = 8
    query_span: int = 64
    min_distance: int = 0
    num_keys: int = 128
    num_values: int = 64
    num_val_sequences: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of recall must be in [0, 1], got {self.share}")
        if self.filler not in ("text", "noise"):
            raise ValueError(f"the filler of recall must be text or noise, got {self.filler!r}")
        if self.num_val_sequences < 1:
            raise ValueError(f"num_val_sequences must be at least 1, got {self.num_val_sequences}")

    def spec(self, *, length: int, end_token: int) -> RecallSpec:
        """The shape of a sequence; keys stand behind the text's tokens and their end, values behind the keys.

        Args:
            length: tokens of a sequence.
            end_token: that ends documents, behind those of the text.
        """
        first_key = end_token + 1
        return RecallSpec(
            length=length,
            min_pairs=self.min_pairs,
            max_pairs=self.max_pairs,
            queries=self.queries,
            query_span=self.query_span,
            min_distance=self.min_distance,
            first_key=first_key,
            num_keys=self.num_keys,
            first_value=first_key + self.num_keys,
            num_values=self.num_values,
            num_noise=end_token,
        )


@dataclasses.dataclass(frozen=True)
class RecallSource:
    """Associative-recall sequences of a data module.

    Attributes:
        spec: their shape.
        filler: streams of the domains to stand between pairs and queries; none for noise.
        shares: of the domains, as many as streams.
        stream: "train", "validation" or "test".
        seed: of all random numbers.
    """

    spec: RecallSpec
    filler: Sequence[TokenStream]
    shares: Sequence[Fraction]
    stream: Stream
    seed: int

    def sample(
        self, epoch: int, sample_ids: Int64[Tensor, " batch"], *, control: Control = "none"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, labels and segment_ids of the given sequences; they depend on (seed, epoch, id) alone."""
        batch = sample_recall(
            self.spec,
            sample_ids,
            seed=self.seed,
            epoch=epoch,
            stream=self.stream,
            filler=self._text(epoch, sample_ids) if self.filler else None,
            control=control,
        )
        return batch.tokens, batch.labels, batch.segment_ids

    def _text(self, epoch: int, sample_ids: Tensor) -> Tensor:
        """A window of text anywhere in a domain for each sequence."""
        words = random_words(self.seed, Purpose.FILLER, self.stream, sample_ids[:, None], epoch, 1)
        domains = [pick(self.shares, word) for word in words[:, 0].tolist()]
        text = torch.empty(len(domains), self.spec.length, dtype=torch.int64)
        for domain, stream in enumerate(self.filler):
            rows = [row for row, picked in enumerate(domains) if picked == domain]
            places = [scaled(high, low, len(stream)) for high, low in words[rows, 1:3].tolist()]
            text[rows] = cut_windows(
                stream, torch.tensor(places, dtype=torch.int64), self.spec.length, pad=False
            ).tokens
        return text


class RecallSequences(Dataset[TextBatch]):
    """Recall sequences 0, 1, ... of a stream.

    Args:
        recall: where they come from.
        source: number of recall among the sources.
        count: how many.
        control: what to ask for, "none" for keys that were stored.

    Raises:
        ValueError: the control needs more keys than there are.
    """

    def __init__(self, recall: RecallSource, source: int, *, count: int, control: Control = "none") -> None:
        recall.spec.check_control(control)
        self.recall = recall
        self.source = source
        self.count = count
        self.control = control

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: BatchIndex) -> TextBatch:
        sample_ids = torch.tensor(list(index.ids))
        tokens, labels, segment_ids = self.recall.sample(index.epoch, sample_ids, control=self.control)
        return TextBatch(
            tokens=tokens,
            labels=labels,
            segment_ids=segment_ids.contiguous(),
            recall_mask=labels != IGNORED,
            num_bytes=torch.zeros_like(sample_ids),
            source=torch.full_like(sample_ids, self.source),
            sample_ids=sample_ids,
        )
