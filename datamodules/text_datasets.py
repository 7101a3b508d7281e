"""Batches of text and associative recall: what is sample i, and what is in it.

Sample i of epoch e is a function of (seed, e, i) and the settings. Training numbers its samples through all
epochs, n = e S + i with S samples an epoch, shuffles them within their batch, and shares n = 0, 1, 2, ... out
among the domains and recall so that each kind has its share of any first N samples. The j-th sample of a
domain is window j of its passes over the text: a pass shuffles the windows anew, and reads every token once,
less what is left over at the end.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from enum import IntEnum
from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loader import BatchIndex
from datamodules.packing import IGNORED, TextBatch, TokenStream, cut_windows
from theria.tasks.philox import WORD_BITS, WORD_MASK, philox_4x32
from theria.tasks.recall import RecallSpec, sample_recall
from theria.tasks.synthetic_seqcls import STREAMS, Stream

Control = Literal["none", "never_stored", "previous_shard"]

CONTROLS: tuple[Control, ...] = ("never_stored", "previous_shard")
"""Recall that no model can answer: keys without a pair, and pairs behind a shard boundary."""

_PURPOSE_SHIFT = 8
_WORDS_PER_BLOCK = 4
_LARGEST_DENOMINATOR = 10**6


class _Purpose(IntEnum):
    """What a random word is for; numbers that no other stream of words uses."""

    WINDOW_ORDER = 128
    WINDOW_PHASE = 129
    BATCH_ORDER = 130
    FILLER = 131


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
        words = _words(self.seed, _Purpose.FILLER, self.stream, sample_ids[:, None], epoch, 1)
        domains = [_pick(self.shares, word) for word in words[:, 0].tolist()]
        text = torch.empty(len(domains), self.spec.length, dtype=torch.int64)
        for domain, stream in enumerate(self.filler):
            rows = [row for row, picked in enumerate(domains) if picked == domain]
            places = [_scaled(high, low, len(stream)) for high, low in words[rows, 1:3].tolist()]
            text[rows] = cut_windows(stream, _as_ids(places), self.spec.length, pad=False).tokens
        return text


class TrainingMixture(Dataset[TextBatch]):
    """Training batches: text of the domains by their shares, and recall.

    Args:
        streams: training text of each domain.
        shares: of the domains among the text, adding up to 1.
        recall: the recall sequences; None for text alone.
        recall_share: their part of all sequences.
        length: of a sequence.
        batch_size: sequences of a batch over all ranks, within which the kinds are shuffled.
        samples_per_epoch: a multiple of batch_size.
        seed: of all random numbers.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        shares: Sequence[Fraction],
        *,
        recall: RecallSource | None,
        recall_share: Fraction,
        length: int,
        batch_size: int,
        samples_per_epoch: int,
        seed: int,
    ) -> None:
        self.streams = streams
        self.recall = recall
        self.shares = [share * (1 - recall_share) for share in shares] + [recall_share]
        self.length = length
        self.batch_size = batch_size
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self._orders: dict[int, tuple[int, Tensor, int]] = {}

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, index: BatchIndex) -> TextBatch:
        sample_ids = torch.tensor(list(index.ids))
        kinds = [allocate(n, self.shares) for n in self._numbers(index)]
        source = torch.tensor([kind for kind, _ in kinds])
        shape = (len(kinds), self.length)
        batch = TextBatch(
            tokens=torch.empty(shape, dtype=torch.int64),
            labels=torch.empty(shape, dtype=torch.int64),
            segment_ids=torch.empty(shape, dtype=torch.int64),
            recall_mask=torch.zeros(shape, dtype=torch.bool),
            num_bytes=torch.zeros(len(kinds), dtype=torch.int64),
            source=source,
            sample_ids=sample_ids,
        )
        for domain, stream in enumerate(self.streams):
            rows = (source == domain).nonzero()[:, 0]
            places = [self._place(domain, kinds[row][1]) for row in rows.tolist()]
            windows = cut_windows(stream, _as_ids(places), self.length, pad=False)
            for name, part in windows._asdict().items():
                getattr(batch, name)[rows] = part
        rows = (source == len(self.streams)).nonzero()[:, 0]
        if self.recall is not None and len(rows):
            tokens, labels, segment_ids = self.recall.sample(index.epoch, sample_ids[rows])
            batch.tokens[rows], batch.labels[rows], batch.segment_ids[rows] = tokens, labels, segment_ids
            batch.recall_mask[rows] = labels != IGNORED
        return batch

    def _numbers(self, index: BatchIndex) -> list[int]:
        """Place of each sample in the order in which kinds are shared out: its own, shuffled in its batch."""
        numbers = []
        batches = sorted({i // self.batch_size for i in index.ids})
        blocks = -(-self.batch_size // _WORDS_PER_BLOCK)
        words = _words(
            self.seed, _Purpose.BATCH_ORDER, "train", torch.tensor(batches)[:, None], index.epoch, blocks
        )
        orders = words[:, : self.batch_size].argsort(dim=1, stable=True).tolist()
        order_of = dict(zip(batches, orders, strict=True))
        for i in index.ids:
            batch, within = divmod(i, self.batch_size)
            first = index.epoch * self.samples_per_epoch + batch * self.batch_size
            numbers.append(first + order_of[batch][within])
        return numbers

    def _place(self, domain: int, number: int) -> int:
        """Where the window begins that the domain's sample of this number reads."""
        size = len(self.streams[domain])
        windows = max(1, size // self.length)
        turn, within = divmod(number, windows)
        held, order, phase = self._orders.get(domain, (-1, torch.empty(0), 0))
        if held != turn:
            ids = torch.tensor([[domain]])
            blocks = -(-windows // _WORDS_PER_BLOCK)
            words = _words(self.seed, _Purpose.WINDOW_ORDER, "train", ids, turn, blocks)
            order = words[0, :windows].argsort(stable=True)
            word = _words(self.seed, _Purpose.WINDOW_PHASE, "train", ids, turn, 1)[0].tolist()
            phase = _scaled(word[0], word[1], size)
            self._orders[domain] = (turn, order, phase)
        return (phase + int(order[within]) * self.length) % size


class TextWindows(Dataset[TextBatch]):
    """A split of a domain from its beginning to its end, once; the last window is padded.

    Args:
        stream: the split.
        source: number of the domain.
        length: of a window.
        limit: take this many windows only, evenly spread; None for all.
    """

    def __init__(self, stream: TokenStream, source: int, *, length: int, limit: int | None) -> None:
        self.stream = stream
        self.source = source
        self.length = length
        self.windows = -(-len(stream) // length)
        self.taken = self.windows if limit is None else min(limit, self.windows)

    def __len__(self) -> int:
        return self.taken

    def __getitem__(self, index: BatchIndex) -> TextBatch:
        sample_ids = torch.tensor(list(index.ids))
        windows = cut_windows(
            self.stream, sample_ids * self.windows // self.taken * self.length, self.length, pad=True
        )
        return TextBatch(
            tokens=windows.tokens,
            labels=windows.labels,
            segment_ids=windows.segment_ids,
            recall_mask=torch.zeros_like(windows.tokens, dtype=torch.bool),
            num_bytes=windows.num_bytes,
            source=torch.full_like(sample_ids, self.source),
            sample_ids=sample_ids,
        )


class RecallSequences(Dataset[TextBatch]):
    """Recall sequences 0, 1, ... of a stream.

    Args:
        recall: where they come from.
        source: number of recall among the sources.
        count: how many.
        control: what to ask for, "none" for keys that were stored.
    """

    def __init__(self, recall: RecallSource, source: int, *, count: int, control: Control = "none") -> None:
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


def domain_shares(weights: Mapping[str, float]) -> list[Fraction]:
    """Weights as exact parts of 1."""
    exact = [as_fraction(weight / sum(weights.values())) for weight in weights.values()]
    return [weight / sum(exact) for weight in exact]


def as_fraction(value: float) -> Fraction:
    """The number as it was written, so that sums over many samples do not round."""
    return Fraction(value).limit_denominator(_LARGEST_DENOMINATOR)


def allocate(number: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """The kind of sample `number` >= 0, and how many of that kind are before it.

    One kind after the other takes floor(m s) of the first m samples that the kinds before it leave, where s
    is its part of what they leave. So counts have a closed form, and of the first N samples kind k has
    N share_k, up to less than the number of kinds.
    """
    left = Fraction(1)
    for kind, share in enumerate(shares[:-1]):
        part = share / left
        before = number * part.numerator // part.denominator
        if (number + 1) * part.numerator // part.denominator > before:
            return kind, before
        number -= before
        left -= share
    return len(shares) - 1, number


def _scaled(high: int, low: int, bound: int) -> int:
    """A number in [0, bound) from two random words."""
    return ((high << WORD_BITS | low) * bound) >> (2 * WORD_BITS)


def _as_ids(numbers: Sequence[int]) -> Int64[Tensor, " numbers"]:
    return torch.tensor(numbers, dtype=torch.int64)


def _pick(shares: Sequence[Fraction], word: int) -> int:
    """A kind at random by its share, from a word of 32 bits."""
    below = Fraction(0)
    for kind, share in enumerate(shares):
        below += share
        if word < below * 2**WORD_BITS:
            return kind
    raise ValueError(f"the shares {shares} do not add up to 1")


def _words(
    seed: int, purpose: _Purpose, stream: Stream, ids: Int64[Tensor, "ids 1"], epoch: int, blocks: int
) -> Int64[Tensor, "ids words"]:
    """Random words of each id: the counter is (block, id, epoch, purpose and stream), the key is the seed."""
    counter = (
        torch.arange(blocks),
        ids & WORD_MASK,
        torch.tensor(epoch & WORD_MASK),
        torch.tensor(purpose << _PURPOSE_SHIFT | STREAMS[stream]),
    )
    return torch.stack(philox_4x32(counter, key=seed), dim=-1).flatten(1)
