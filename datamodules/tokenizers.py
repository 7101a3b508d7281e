"""Tokenizers: bytes, a file of the tokenizers package, or byte-level BPE trained on the corpus."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from datamodules.atomic import replace_when_written
from datamodules.corpus import digest

NUM_BYTES = 256
# documents encoded in one call, which the package spreads over threads
_ENCODE_AT_ONCE = 256


class Tokenizer(Protocol):
    """What turns documents into tokens 0 .. num_tokens - 1 and back.

    Attributes:
        num_tokens: size of the vocabulary, without any token for the end of a document.
        identity: a string that is equal for equal tokenizers only.
    """

    num_tokens: int
    identity: str

    def encode(self, texts: Sequence[bytes]) -> list[Tensor]:
        """int64 tokens of each text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...


class ByteTokenizer:
    """Every byte is a token."""

    num_tokens = NUM_BYTES
    identity = "byte"

    def encode(self, texts: Sequence[bytes]) -> list[Tensor]:
        """The bytes of each text."""
        return [
            torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
            if text
            else torch.zeros(0, dtype=torch.int64)
            for text in texts
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 as replacement characters."""
        return bytes(tokens).decode(errors="replace")


class FileTokenizer:
    """A tokenizer in the JSON format of the tokenizers package.

    No special tokens are added to what it gives, and it neither cuts nor pads, whatever the file says: a
    document is tokenized whole. Its vocabulary is taken to reach to its largest id.

    Args:
        path: the file.

    Raises:
        ValueError: the file is missing or not such a tokenizer.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"there is no tokenizer file {path}; 'byte' and 'bpe' name built-in tokenizers")
        try:
            content = path.read_text(encoding="utf-8")
            self._tokenizer = HFTokenizer.from_str(content)
        # the package raises nothing more special
        except Exception as error:
            raise ValueError(f"{path} is not a file of the tokenizers package: {error}") from error
        # many files carry the length of some model's input, and would cut every document there
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"the tokenizer {path} has an empty vocabulary")
        self.num_tokens = max(vocabulary.values()) + 1
        self.identity = digest([content.encode()])

    def encode(self, texts: Sequence[bytes]) -> list[Tensor]:
        """Tokens of each text."""
        tokens = []
        for first in range(0, len(texts), _ENCODE_AT_ONCE):
            part = [text.decode() for text in texts[first : first + _ENCODE_AT_ONCE]]
            encodings = self._tokenizer.encode_batch_fast(part, add_special_tokens=False)
            tokens += [torch.tensor(encoding.ids, dtype=torch.int64) for encoding in encodings]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def train_bpe(texts: Iterable[bytes], vocab_size: int, path: Path) -> FileTokenizer:
    """Byte-level BPE of exactly vocab_size tokens, written to path; the same texts give the same file.

    Raises:
        ValueError: vocab_size leaves no room beside the bytes, or the texts have too few pairs to merge.
    """
    if vocab_size <= NUM_BYTES:
        raise ValueError(
            f"tokenizer_vocab_size must be above {NUM_BYTES}, the bytes themselves, got {vocab_size}"
        )
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the training text yields {tokenizer.get_vocab_size()} tokens at most, "
            f"tokenizer_vocab_size = {vocab_size} asks for more"
        )
    with replace_when_written(path) as temporary:
        temporary.write_text(tokenizer.to_str(), encoding="utf-8")
    return FileTokenizer(path)
