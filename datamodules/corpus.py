"""Documents of several domains, freed of repeated paragraphs and split into training, validation and test.

Without the first step a split by document leaks: documentation and sources repeat whole paragraphs, and about
a third of held-out prose would stand in the training text word for word.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from datamodules.documents import Document

SPLITS = ("train", "validation", "test")

_BREAK = re.compile(rb"(\n(?:[ \t\r\f\v]*\n)+)")
_KEY_BYTES = 16
_HASH_BITS = 64

Domains = Mapping[str, Sequence[Document]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The texts of every domain's splits, and the hashes that name them.

    Attributes:
        texts: domain -> split -> documents in UTF-8.
    """

    texts: dict[str, dict[str, list[bytes]]]

    def split_hash(self, domain: str, split: str) -> str:
        """SHA-256 of the documents of a split, in order."""
        return digest(self.texts[domain][split])

    @property
    def hash(self) -> str:
        """SHA-256 of everything: names of domains, and their splits."""
        parts = (
            part.encode()
            for domain in self.texts
            for part in (domain, *(self.split_hash(domain, split) for split in SPLITS))
        )
        return digest(parts)


def build_corpus(domains: Domains, *, val_fraction: float, test_fraction: float) -> Corpus:
    """De-duplicate paragraphs over all domains, then split each by document hash.

    A document's split is decided by the SHA-256 of its own text before de-duplication, as a number u in
    [0, 1): validation below val_fraction, test in the next test_fraction, else training. So it stays where
    it is whatever is added to the corpus.

    Raises:
        ValueError: fractions out of range, or a split of a domain that gets no document.
    """
    if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            "val_fraction and test_fraction must be above 0 and leave something to train on, "
            f"got {val_fraction} and {test_fraction}"
        )
    texts: dict[str, dict[str, list[bytes]]] = {}
    for domain, documents in _without_repeats(domains):
        splits: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        for original, kept in documents:
            splits[_split_of(original, val_fraction, test_fraction)].append(kept)
        for split, members in splits.items():
            if not members:
                raise ValueError(
                    f"domain {domain!r}: none of its {len(documents)} documents falls into the {split} "
                    "split; give more, set max_document_bytes to cut long ones, or change the fractions"
                )
        texts[domain] = splits
    return Corpus(texts)


def cut_documents(documents: Iterable[Document], max_bytes: int | None) -> list[Document]:
    """Documents of at most max_bytes each, cut between paragraphs; a longer paragraph stays whole."""
    if max_bytes is None:
        return list(documents)
    pieces = []
    for document in documents:
        current = bytearray()
        texts = []
        for paragraph, gap in paragraphs(document.text):
            if current and len(current) + len(paragraph) > max_bytes:
                texts.append(bytes(current))
                current = bytearray()
            current += paragraph + gap
        texts.append(bytes(current))
        pieces += [Document(f"{document.name}#{number}", text) for number, text in enumerate(texts)]
    return pieces


def paragraphs(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Paragraphs, each with the blank lines behind it; joined they give the text."""
    parts = _BREAK.split(text)
    yield from zip(parts[::2], [*parts[1::2], b""], strict=True)


def paragraph_key(paragraph: bytes) -> bytes:
    """What is equal for paragraphs that differ in white space only; empty where there is nothing else."""
    words = paragraph.split()
    return hashlib.blake2b(b" ".join(words), digest_size=_KEY_BYTES).digest() if words else b""


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of a sequence of byte strings, where their boundaries count."""
    result = hashlib.sha256()
    for part in parts:
        result.update(len(part).to_bytes(8, "little"))
        result.update(part)
    return result.hexdigest()


def _without_repeats(domains: Domains) -> Iterator[tuple[str, list[tuple[bytes, bytes]]]]:
    """Documents before and after, with every paragraph where it stands first; without those left empty."""
    seen: set[bytes] = set()
    for domain, documents in domains.items():
        pairs = ((document.text, _first_occurrences(document.text, seen)) for document in documents)
        yield domain, [pair for pair in pairs if pair[1].strip()]


def _first_occurrences(text: bytes, seen: set[bytes]) -> bytes:
    kept = []
    for paragraph, gap in paragraphs(text):
        key = paragraph_key(paragraph)
        if key and key in seen:
            continue
        seen.add(key)
        kept += [paragraph, gap]
    return b"".join(kept)


def _split_of(text: bytes, val_fraction: float, test_fraction: float) -> str:
    number = int.from_bytes(hashlib.sha256(text).digest()[: _HASH_BITS // 8], "big") / 2**_HASH_BITS
    if number < val_fraction:
        return "validation"
    return "test" if number < val_fraction + test_fraction else "train"
