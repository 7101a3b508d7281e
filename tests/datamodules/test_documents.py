"""What is read is what the files hold, and what cannot be read is named."""

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules.documents import Document, Domain, read_documents


def texts(domain: Domain) -> list[bytes]:
    return [document.text for document in read_documents(domain)]


def test_the_prose_is_every_help_topic_of_the_running_python() -> None:
    from pydoc_data.topics import topics

    documents = read_documents(Domain(built_in="python_docs"))
    assert {document.name: document.text.decode() for document in documents} == topics


def test_the_sources_are_the_standard_library_without_tests_and_without_the_prose() -> None:
    documents = dict(read_documents(Domain(built_in="python_sources")))
    assert documents["json/decoder.py"] == Path(json.decoder.__file__).read_bytes()
    assert len(documents) > 300
    assert sum(map(len, documents.values())) > 5_000_000
    folders = {part for name in documents for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "pydoc_data", "__pycache__"}
    for text in documents.values():
        text.decode()


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_files_are_read_whole_and_json_lines_by_their_field(
    suffix: str, compress: Any, tmp_path: Path
) -> None:
    text = "one\n\ntwo \u00e9\n".encode()
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(text))
    lines = b'{"body": "first\\nline", "n": 1}\n\n{"body": "second"}\r\n'
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(lines))
    domain = Domain(files=[str(tmp_path / "*")], field="body")
    assert texts(domain) == [text, b"first\nline", b"second"]


def test_globs_reach_into_folders_and_a_file_that_matches_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    patterns = [str(tmp_path / "**" / "*.txt"), str(tmp_path / "a.txt")]
    assert texts(Domain(files=patterns)) == [b"a", b"b"]
    assert texts(Domain(files=patterns[::-1])) == [b"a", b"b"]


def refusal(domain: Domain) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_documents(domain)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_glob_without_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    pattern = str(tmp_path / "*.txt")
    assert f"no file matches '{pattern}'" in refusal(Domain(files=[pattern]))
    # also where another pattern has matches
    (tmp_path / "a.md").write_text("a")
    assert f"no file matches '{pattern}'" in refusal(Domain(files=[str(tmp_path / "*.md"), pattern]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "has no field 'text', it has 'body'"),
        ("{}", "has no field 'text', it has none"),
        ('["text"]', "has no field 'text', it has a list, not an object"),
        ('{"text": 3}', "field 'text' must be a string, got a int"),
        ('{"text": "x"', "is not JSON"),
        ('{"text": "\\ud800"}', "holds half a surrogate pair"),
    ],
)
def test_a_line_without_its_text_is_named_with_its_number(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    assert refusal(Domain(files=[str(path)])).startswith(f"{path}:3")
    assert message in refusal(Domain(files=[str(path)]))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_is_not_utf8_is_named_with_its_byte(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"latin.txt{suffix}"
    content = "caf\u00e9 au lait".encode("latin-1")
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert f"{path} is not UTF-8: byte 0xe9 at offset 3" in refusal(Domain(files=[str(path)]))


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
@pytest.mark.parametrize("damage", ["cut", "not_compressed"])
def test_a_damaged_archive_is_named(suffix: str, compress: Any, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compress.compress(b"some text " * 100)[:-8] if damage == "cut" else b"plain text")
    assert f"{path} is a damaged .{suffix} file" in refusal(Domain(files=[str(path)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of built_in, files and dataset, got none"),
        ({"built_in": "python_docs", "files": ["a"]}, "got built_in and files"),
        ({"built_in": "prose"}, "built_in must be one of python_docs, python_sources, got 'prose'"),
        ({"files": ["a"], "weight": 0.0}, "weight must be a finite number above 0, got 0.0"),
        ({"files": ["a"], "weight": float("inf")}, "weight must be a finite number above 0, got inf"),
        ({"files": ["a"], "max_document_bytes": 0}, "max_document_bytes must be at least 1, got 0"),
    ],
)
def test_impossible_domains_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Domain(**settings)


def test_a_dataset_gives_a_document_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    domain = Domain(dataset="user/name", config="small", dataset_split="validation", field="body")
    assert read_documents(domain) == [
        Document("user/name[0]", b"one"),
        Document("user/name[1]", b"two"),
    ]
    assert asked == [(("user/name", "small"), {"split": "validation"})]
    assert "user/name[0] has no field 'text', it has 'body'" in refusal(Domain(dataset="user/name"))


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(Domain(dataset="user/name"))
