"""Batches of text and associative recall: what is sample i, and what is in it.

Sample i of epoch e is a function of (seed, e, i) and the settings. Training numbers its samples through all
epochs, n = e S + i with S samples an epoch, shuffles them within their batch, and shares n = 0, 1, 2, ... out
among the domains and recall so that each kind has its share of any first N samples. The j-th sample of a
domain is window j of its passes over the text: a pass shuffles the windows anew, and reads every token once,
less what is left over at the end.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loader import BatchIndex
from datamodules.packing import IGNORED, TextBatch, TokenStream, cut_windows
from datamodules.random_words import WORDS_PER_BLOCK, Purpose, random_words, scaled
from datamodules.recall_sequences import RecallSource
from datamodules.shares import allocate


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
            windows = cut_windows(stream, torch.tensor(places, dtype=torch.int64), self.length, pad=False)
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
        blocks = -(-self.batch_size // WORDS_PER_BLOCK)
        words = random_words(
            self.seed, Purpose.BATCH_ORDER, "train", torch.tensor(batches)[:, None], index.epoch, blocks
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
            blocks = -(-windows // WORDS_PER_BLOCK)
            words = random_words(self.seed, Purpose.WINDOW_ORDER, "train", ids, turn, blocks)
            order = words[0, :windows].argsort(stable=True)
            word = random_words(self.seed, Purpose.WINDOW_PHASE, "train", ids, turn, 1)[0].tolist()
            phase = scaled(word[0], word[1], size)
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
