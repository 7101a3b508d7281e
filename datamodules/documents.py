"""Reading documents: Python's own documentation and sources, files, or a dataset of the Hugging Face Hub."""

import bz2
import dataclasses
import glob
import gzip
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
_BUILT_IN = ("python_docs", "python_sources")
# the topics module holds the prose itself, as one string a topic
_NOT_SOURCES = ("pydoc_data", "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
_BUILD_SETTINGS = "_sysconfigdata"


class Document(NamedTuple):
    """A document of a domain: what it is called in messages, and its text in UTF-8."""

    name: str
    text: bytes


@dataclasses.dataclass(frozen=True)
class Domain:
    """Where the documents of one domain come from: exactly one of built_in, files and dataset.

    Attributes:
        weight: share of the training text, relative to the other domains.
        built_in: "python_docs", the prose of the running Python's help topics, or "python_sources", its
            standard library without tests.
        files: paths and globs (``**`` for any folders) of UTF-8 text, a document a file, or of .jsonl, a
            document a line; also with .gz, .bz2 or .xz behind.
        dataset: name of a dataset on the Hugging Face Hub, a document a row.
        config: of the dataset, where it has several.
        dataset_split: of the dataset; it is split by document hash once more.
        field: that holds the text in a .jsonl line or a row.
        max_document_bytes: cut longer documents between paragraphs; null leaves them whole. A single large
            file cannot be split otherwise.
    """

    weight: float = 1.0
    built_in: str | None = None
    files: list[str] = dataclasses.field(default_factory=list)
    dataset: str | None = None
    config: str | None = None
    dataset_split: str = "train"
    field: str = "text"
    max_document_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("built_in", "files", "dataset") if getattr(self, name)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"a domain needs exactly one of built_in, files and dataset, got {got}")
        if self.built_in is not None and self.built_in not in _BUILT_IN:
            raise ValueError(f"built_in must be one of {', '.join(_BUILT_IN)}, got {self.built_in!r}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be a finite number above 0, got {self.weight}")
        if self.max_document_bytes is not None and self.max_document_bytes < 1:
            raise ValueError(f"max_document_bytes must be at least 1, got {self.max_document_bytes}")


def read_documents(domain: Domain) -> list[Document]:
    """The documents of a domain, in an order that depends on their names alone.

    Raises:
        ValueError: no file matches, one is damaged or not UTF-8, a field is missing, or a package is.
    """
    if domain.built_in == "python_docs":
        return _python_docs()
    if domain.built_in == "python_sources":
        return _python_sources(Path(sysconfig.get_paths()["stdlib"]))
    if domain.dataset is not None:
        return list(_dataset_rows(domain))
    return [document for path in _matching_files(domain.files) for document in _read_file(path, domain.field)]


def _python_docs() -> list[Document]:
    from pydoc_data.topics import topics  # half a megabyte that others need not load

    return [Document(name, topics[name].encode()) for name in sorted(topics)]


def _python_sources(root: Path) -> list[Document]:
    documents = []
    for folder, subfolders, names in os.walk(root):
        # in place, so that os.walk does not descend into what is left out
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_SOURCES)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith(_BUILD_SETTINGS):
                path = Path(folder, name)
                documents.append(Document(path.relative_to(root).as_posix(), path.read_bytes()))
    if not documents:
        raise ValueError(f"this Python has no sources of its standard library in {root}")
    return documents


def _matching_files(patterns: list[str]) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        matches = {Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)}
        matches = {path for path in matches if path.is_file()}
        if not matches:
            raise ValueError(f"no file matches {pattern!r} (in {Path.cwd()})")
        found |= matches
    return sorted(found)


def _read_file(path: Path, field: str) -> Iterator[Document]:
    text = _read_bytes(path)
    _check_utf8(path, text)
    inner = path.with_suffix("") if path.suffix in _OPENERS else path
    if inner.suffix != ".jsonl":
        yield Document(str(path), text)
        return
    for number, line in enumerate(text.split(b"\n"), start=1):
        if line.strip():
            name = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} is not JSON: {error}") from error
            yield Document(name, _text_of(row, field, name))


def _read_bytes(path: Path) -> bytes:
    opener: Callable[..., Any] = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            content: bytes = file.read()
    except _DAMAGED as error:
        raise ValueError(f"{path} is a damaged {path.suffix} file: {error}") from error
    except OSError as error:
        # bz2 says OSError without a number where the data are wrong
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is a damaged {path.suffix} file: {error}") from error
    return content


def _check_utf8(path: Path, text: bytes) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start} ({error.reason})"
        ) from error


def _text_of(row: object, field: str, name: str) -> bytes:
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}, not an object"
        raise ValueError(f"{name} has no field {field!r}, it has {has or 'none'}")
    if not isinstance(row[field], str):
        raise ValueError(f"{name}: field {field!r} must be a string, got a {type(row[field]).__name__}")
    try:
        return str(row[field]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: field {field!r} holds half a surrogate pair: {error}") from error


def _dataset_rows(domain: Domain) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"dataset {domain.dataset!r} needs the package datasets: pip install datasets"
        ) from error
    rows = datasets.load_dataset(domain.dataset, domain.config, split=domain.dataset_split)
    for number, row in enumerate(rows):
        name = f"{domain.dataset}[{number}]"
        yield Document(name, _text_of(row, domain.field, name))
