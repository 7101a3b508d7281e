"""What xz needs for a held-out text once it has read the training text."""

import lzma

import torch

from datamodules import CalibrationText
from datamodules.packing import TokenStream

_LARGEST_DICTIONARY = 2**30


def xz_figures(data: CalibrationText) -> dict[str, float]:
    """Bits a byte of the test split of every domain."""
    return {
        domain: xz_bits_per_byte(split_text(data, domain, "train"), split_text(data, domain, "test"))
        for domain in data.domains
    }


def xz_bits_per_byte(training: bytes, held_out: bytes) -> float:
    """(size of training + held-out minus size of training) in bits over bytes of held-out, by `xz -9e`.

    The dictionary is as large as both texts, so that the whole training text is at hand.
    """
    size = min(max(len(training) + len(held_out), 2**16), _LARGEST_DICTIONARY)
    added = _xz_size(training + held_out, size) - _xz_size(training, size)
    return 8 * added / len(held_out)


def split_text(data: CalibrationText, domain: str, split: str) -> bytes:
    """The documents of a split, one behind the other."""
    stream = data.corpus.streams[domain][split]
    if data.corpus.tokenizer.identity == "byte":
        return bytes(_without_ends(stream, data.end_token).to(torch.uint8).tolist())
    return data.corpus.tokenizer.decode(_without_ends(stream, data.end_token).tolist()).encode()


def _without_ends(stream: TokenStream, end: int) -> torch.Tensor:
    tokens = stream.tokens.to(torch.int64)
    return tokens[tokens != end]


def _xz_size(text: bytes, dictionary: int) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))
