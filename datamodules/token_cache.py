"""Token streams of a corpus, made once and then mapped from a file that its content names."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.atomic import replace_when_written
from datamodules.corpus import SPLITS, Corpus, build_corpus, digest
from datamodules.documents import Document
from datamodules.packing import TokenStream
from datamodules.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe

# of the files and of the rules that make a corpus: another number is another cache
_FORMAT = "2"
_PARTS = tuple(field.name for field in dataclasses.fields(TokenStream))
_LARGEST_UINT16 = 2**16 - 1

Streams = dict[str, dict[str, TokenStream]]


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus ready to be cut into windows.

    Attributes:
        streams: domain -> split -> tokens.
        record: plain values: "corpus_sha256", "tokenizer", and by domain and split the number of
            "documents", "bytes" and "tokens", "bytes_per_token" and "sha256".
        tokenizer: that made the tokens.
    """

    streams: Streams
    record: dict[str, Any]
    tokenizer: Tokenizer

    def summary(self) -> str:
        """The hash, and a line a split: documents, bytes, tokens, bytes per token and hash."""
        lines = [self.record["corpus_sha256"][:16]]
        for domain, splits in self.record["domains"].items():
            for split, counts in splits.items():
                lines.append(
                    f"{domain} {split}: {counts['documents']} documents, {counts['bytes']} bytes, "
                    f"{counts['tokens']} tokens, {counts['bytes_per_token']:.3f} bytes per token, "
                    f"sha256 {counts['sha256'][:16]}"
                )
        return "\n".join(lines)


class CorpusCache:
    """The corpus of some documents under a folder of cached files.

    Every process may ask at once: files are written beside their place and then moved there.

    Args:
        documents: of every domain.
        val_fraction, test_fraction: shares of the documents held out.
        folder: of the files.
    """

    def __init__(
        self,
        documents: Mapping[str, Sequence[Document]],
        *,
        val_fraction: float,
        test_fraction: float,
        folder: Path,
    ) -> None:
        self._documents = documents
        self._fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        self._folder = folder
        self._corpus: Corpus | None = None
        parts = [_FORMAT.encode(), repr(sorted(self._fractions.items())).encode()]
        for domain, members in documents.items():
            parts += [domain.encode(), digest(document.text for document in members).encode()]
        self.key = digest(parts)

    def tokenizer(self, name: str, vocab_size: int) -> Tokenizer:
        """The byte tokenizer, BPE trained on the training split, or that of a file.

        Args:
            name: "byte", "bpe" or a path.
            vocab_size: of "bpe".
        """
        if name == "byte":
            return ByteTokenizer()
        if name != "bpe":
            return FileTokenizer(Path(name).expanduser())
        path = self._folder / f"bpe-{vocab_size}-{self.key}.json"
        if path.exists():
            return FileTokenizer(path)
        texts = self._built().texts
        return train_bpe((text for splits in texts.values() for text in splits["train"]), vocab_size, path)

    def tokenized(self, tokenizer: Tokenizer) -> TokenizedCorpus:
        """The token streams, from the file if there is one."""
        path = self._folder / f"tokens-{digest([self.key.encode(), tokenizer.identity.encode()])}.safetensors"
        if not path.exists():
            self._write(path, tokenizer)
        return _read(path, tokenizer)

    def _built(self) -> Corpus:
        if self._corpus is None:
            self._corpus = build_corpus(self._documents, **self._fractions)
        return self._corpus

    def _write(self, path: Path, tokenizer: Tokenizer) -> None:
        corpus = self._built()
        dtype = torch.uint16 if tokenizer.num_tokens <= _LARGEST_UINT16 else torch.int32
        tensors: dict[str, Tensor] = {}
        record: dict[str, Any] = {
            "corpus_sha256": corpus.hash,
            "tokenizer": tokenizer.identity,
            "domains": {domain: {} for domain in corpus.texts},
        }
        for domain, splits in corpus.texts.items():
            for split, texts in splits.items():
                sizes = [len(text) for text in texts]
                stream = TokenStream.of(tokenizer.encode(texts), sizes, end=tokenizer.num_tokens, dtype=dtype)
                tensors |= {f"{domain}/{split}/{part}": getattr(stream, part) for part in _PARTS}
                record["domains"][domain][split] = {
                    "documents": stream.num_documents,
                    "bytes": stream.num_bytes,
                    "tokens": len(stream),
                    "bytes_per_token": stream.num_bytes / len(stream),
                    "sha256": corpus.split_hash(domain, split),
                }
        with replace_when_written(path) as temporary:
            save_file(tensors, temporary, metadata={"record": json.dumps(record)})


def _read(path: Path, tokenizer: Tokenizer) -> TokenizedCorpus:
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            streams = {
                domain: {
                    split: TokenStream(*(file.get_tensor(f"{domain}/{split}/{part}") for part in _PARTS))
                    for split in SPLITS
                }
                for domain in record["domains"]
            }
    except SafetensorError as error:
        raise ValueError(f"the cached tokens {path} are damaged ({error}): delete the file") from error
    return TokenizedCorpus(streams, record, tokenizer)
