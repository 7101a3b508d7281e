"""Documents as one stream of tokens, and windows of it as sequences with shard boundaries.

    tokens       E a b c E d e E f ...
    labels       a b c E d e E f ...       E leads every document, and so ends the one before
    segment_ids  0 0 0 0 1 1 1 2 ...

A label is the token that follows, so every token of a text is predicted once, from its own document alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

IGNORED = -100
"""Label where nothing is to be predicted, as ``torch.nn.functional.cross_entropy`` leaves it out."""


class TextBatch(NamedTuple):
    """Sequences of one batch, for ``model(batch.tokens, segment_ids=batch.segment_ids)``.

    Attributes:
        tokens: what the model reads.
        labels: the token to be predicted at each place, ``IGNORED`` where none is.
        segment_ids: from 0, non-decreasing; a new number begins a shard.
        recall_mask: labels that are answers of associative recall; all other labels are text.
        num_bytes: bytes of text that a sequence's labels stand for, to a byte; 0 in recall sequences. Bits
            per byte is the sum of the losses over the sum of these, divided by ln 2.
        source: number of the sequence's domain, in the order of the configuration; behind them recall.
        sample_ids: numbers of the sequences within their epoch.
    """

    tokens: Int64[Tensor, "batch length"]
    labels: Int64[Tensor, "batch length"]
    segment_ids: Int64[Tensor, "batch length"]
    recall_mask: Bool[Tensor, "batch length"]
    num_bytes: Int64[Tensor, " batch"]
    source: Int64[Tensor, " batch"]
    sample_ids: Int64[Tensor, " batch"]


class Windows(NamedTuple):
    """What `cut_windows` gives; fields as those of `TextBatch`."""

    tokens: Int64[Tensor, "batch length"]
    labels: Int64[Tensor, "batch length"]
    segment_ids: Int64[Tensor, "batch length"]
    num_bytes: Int64[Tensor, " batch"]


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """Documents one behind the other, each led by the token E that ends a document.

    Attributes:
        tokens: of any integer dtype.
        starts: where the documents begin, each with its E; and behind the last.
        byte_starts: the same in bytes of text, in which E counts nothing.
    """

    tokens: Tensor
    starts: Int64[Tensor, " documents_and_1"]
    byte_starts: Int64[Tensor, " documents_and_1"]

    @classmethod
    def of(
        cls, documents: Sequence[Tensor], sizes: Sequence[int], *, end: int, dtype: torch.dtype
    ) -> "TokenStream":
        """The stream of documents given as tokens, with their sizes in bytes and the token E.

        Raises:
            ValueError: a token is not below E, so that the stream would be ambiguous.
        """
        largest = max((int(document.max()) for document in documents if len(document)), default=0)
        if largest >= end:
            raise ValueError(f"token {largest} of a document is not below {end}, which ends documents")
        lead = torch.tensor([end])
        return cls(
            tokens=torch.cat([part for document in documents for part in (lead, document)]).to(dtype),
            starts=torch.tensor([0, *(len(document) + 1 for document in documents)]).cumsum(0),
            byte_starts=torch.tensor([0, *sizes]).cumsum(0),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts."""
        return int(self.byte_starts[-1])

    @property
    def num_documents(self) -> int:
        """How many there are."""
        return len(self.starts) - 1


def cut_windows(stream: TokenStream, first: Int64[Tensor, " batch"], length: int, *, pad: bool) -> Windows:
    """Windows of the given length.

    Args:
        stream: what they are cut from.
        first: where each begins, in [0, len(stream)).
        length: of a window.
        pad: what stands behind the end of the stream: one more shard without labels, or the stream anew.
    """
    size = len(stream)
    places = first[:, None] + torch.arange(length + 1)
    within, lap = places % size, places.div(size, rounding_mode="floor")
    tokens = stream.tokens[within].to(torch.int64)
    documents = torch.searchsorted(stream.starts, within, right=True) - 1 + lap * stream.num_documents
    read, labels = tokens[:, :-1], tokens[:, 1:]
    last = first + length
    if pad:
        behind = places[:, :-1] >= size
        documents = documents.clamp(max=stream.num_documents)
        read = read.masked_fill(behind, int(stream.tokens[0]))
        labels = labels.masked_fill(behind, IGNORED)
        last = last.clamp(max=size)
    return Windows(
        tokens=read.contiguous(),
        labels=labels.contiguous(),
        segment_ids=documents[:, :-1] - documents[:, :1],
        num_bytes=_bytes_before(stream, last) - _bytes_before(stream, first),
    )


def _bytes_before(stream: TokenStream, places: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """Bytes of text in the tokens before each place, a document's shared out among its labels equally."""
    within, lap = places % len(stream), places.div(len(stream), rounding_mode="floor")
    document = torch.searchsorted(stream.starts, within, right=True) - 1
    begin, end = stream.starts[document], stream.starts[document + 1]
    byte_begin, byte_end = stream.byte_starts[document], stream.byte_starts[document + 1]
    share = ((within - begin) * (byte_end - byte_begin)).div(end - begin, rounding_mode="floor")
    return lap * stream.byte_starts[-1] + byte_begin + share
