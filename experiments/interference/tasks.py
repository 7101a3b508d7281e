"""The samples of a task, from a file of text or of JSON lines."""

import json
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from experiments.interference.models import InputError, LanguageModel

_LEAST_TOKENS = 2


@dataclass(frozen=True)
class Task:
    """Samples of one task.

    Attributes:
        name: of its file.
        ids: of the samples: the number of the line on which they begin, or what the file calls them.
        texts: as read.
        tokens: what the model reads of them.
    """

    name: str
    ids: tuple[Hashable, ...]
    texts: tuple[str, ...]
    tokens: tuple[Tensor, ...]


def read_task(path: Path, model: LanguageModel, *, samples: int, max_tokens: int, field: str) -> Task:
    """The first samples of a file that have a token to predict.

    Args:
        path: ``.jsonl`` for one object a line, with a text in ``field`` and, if it has one, its name in
            ``id``; any other file for text, whose paragraphs, between blank lines, are the samples.
        model: encodes them.
        samples: to take at most.
        max_tokens: of a sample, of which the first are taken.
        field: of the objects.

    Raises:
        InputError: the file cannot be read, has no sample, several of one id, or one too long for the model.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    read = _objects(path, text, field) if path.suffix == ".jsonl" else _paragraphs(text)
    found: list[tuple[Hashable, str, Tensor]] = []
    for name, sample in read:
        if len(found) == samples:
            break
        tokens = model.encode(sample)[:max_tokens]
        if len(tokens) >= _LEAST_TOKENS:
            found.append((name, sample, tokens))
    if not found:
        raise InputError(f"{path} has no sample of at least {_LEAST_TOKENS} tokens")
    ids, texts, tokens_of = zip(*found, strict=True)
    if len(set(ids)) < len(ids):
        raise InputError(f"{path} calls several samples by the same id: {_repeated(ids)}")
    longest = max(map(len, tokens_of))
    if model.positions is not None and longest > model.positions:
        raise InputError(
            f"{path} has a sample of {longest} tokens, but {model.name} reads {model.positions} at once: "
            "lower --max-tokens"
        )
    return Task(path.name, ids, texts, tokens_of)


def _repeated(ids: Sequence[Hashable]) -> list[Hashable]:
    return [name for name, times in Counter(ids).items() if times > 1][:10]


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs with the number of their first line."""
    begun, lines = 0, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            begun = begun if lines else number
            lines.append(line)
        elif lines:
            yield begun, "\n".join(lines)
            lines = []


def _objects(path: Path, text: str, field: str) -> Iterator[tuple[Hashable, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise InputError(f"{path}:{number} has no text in a field {field!r}")
        name = row.get("id", number)
        if not isinstance(name, str | int):
            raise InputError(f"{path}:{number}: id must be a string or a whole number, received {name!r}")
        yield name, row[field]
