"""Windows against a loop over tokens: what is read, predicted, separated and counted."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamodules.packing import IGNORED, TokenStream, cut_windows

END = 9
DOCUMENTS = st.lists(st.lists(st.integers(0, END - 1), max_size=6), min_size=1, max_size=5)


def stream_of(documents: list[list[int]], bytes_per_token: int = 1) -> TokenStream:
    return TokenStream.of(
        [torch.tensor(document, dtype=torch.int64) for document in documents],
        [len(document) * bytes_per_token for document in documents],
        end=END,
        dtype=torch.uint16,
    )


@settings(deadline=None, derandomize=True)
@given(DOCUMENTS, st.integers(1, 12), st.booleans(), st.data())
def test_windows_are_what_a_loop_reads(
    documents: list[list[int]], length: int, pad: bool, data: st.DataObject
) -> None:
    stream = stream_of(documents)
    flat = [(number, token) for number, d in enumerate(documents) for token in (END, *d)]
    assert len(stream) == len(flat)
    first = data.draw(st.lists(st.integers(0, len(flat) - 1), min_size=1, max_size=4))
    windows = cut_windows(stream, torch.tensor(first), length, pad=pad)
    for row, begin in enumerate(first):
        read, labels, shards = [], [], []
        for place in range(begin, begin + length):
            lap, within = divmod(place, len(flat))
            behind = pad and lap > 0
            read.append(END if behind else flat[within][1])
            labels.append(IGNORED if behind else flat[(within + 1) % len(flat)][1])
            shards.append("pad" if behind else (lap, flat[within][0]))
        assert windows.tokens[row].tolist() == read
        assert windows.labels[row].tolist() == labels
        changes = torch.tensor([0, *(a != b for a, b in itertools.pairwise(shards))])
        assert windows.segment_ids[row].tolist() == changes.cumsum(0).tolist()
    for tensor in windows:
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


@settings(deadline=None, derandomize=True)
@given(DOCUMENTS, st.integers(1, 12), st.integers(1, 3))
def test_windows_side_by_side_predict_everything_once_and_count_every_byte(
    documents: list[list[int]], length: int, bytes_per_token: int
) -> None:
    stream = stream_of(documents, bytes_per_token)
    first = torch.arange(0, len(stream), length)
    windows = cut_windows(stream, first, length, pad=True)
    predicted = windows.labels[windows.labels != IGNORED].tolist()
    # every document's tokens, and behind each its end
    assert predicted == [token for document in documents for token in (*document, END)]
    assert int(windows.num_bytes.sum()) == bytes_per_token * sum(map(len, documents)) == stream.num_bytes
    assert (windows.num_bytes >= 0).all()


@settings(deadline=None, derandomize=True)
@given(DOCUMENTS, st.integers(1, 12), st.data())
def test_bytes_of_a_window_are_its_labels_share(
    documents: list[list[int]], length: int, data: st.DataObject
) -> None:
    stream = stream_of(documents, 3)
    first = data.draw(st.integers(0, len(stream) - 1))
    counted = int(cut_windows(stream, torch.tensor([first]), length, pad=False).num_bytes)
    share = [3 * len(d) / (len(d) + 1) for d in documents for _ in range(len(d) + 1)]
    exact = sum(share[place % len(share)] for place in range(first, first + length))
    assert abs(counted - exact) < 1


def test_labels_never_tell_of_another_document() -> None:
    """The token behind a boundary is no label: the end token that leads it is."""
    windows = cut_windows(stream_of([[1, 2], [3, 4]]), torch.tensor([0]), 6, pad=True)
    assert windows.tokens.tolist() == [[END, 1, 2, END, 3, 4]]
    assert windows.labels.tolist() == [[1, 2, END, 3, 4, END]]
    assert windows.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_empty_documents_are_shards_of_their_end_alone() -> None:
    windows = cut_windows(stream_of([[], [1], []]), torch.tensor([0]), 4, pad=True)
    assert windows.tokens.tolist() == [[END, END, 1, END]]
    assert windows.segment_ids.tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("token", [END, END + 5])
def test_a_token_that_would_end_a_document_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"token {token} of a document is not below {END}"):
        stream_of([[1], [token]])


@pytest.mark.parametrize(("dtype", "top"), [(torch.uint16, 2**16 - 1), (torch.int32, 10**6)])
def test_large_tokens_survive_their_dtype(dtype: torch.dtype, top: int) -> None:
    document: Tensor = torch.tensor([0, top - 1])
    stream = TokenStream.of([document], [2], end=top, dtype=dtype)
    assert stream.tokens.dtype == dtype
    windows = cut_windows(stream, torch.tensor([0]), 3, pad=True)
    assert windows.tokens.tolist() == [[top, 0, top - 1]]
