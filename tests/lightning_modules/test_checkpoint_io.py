"""Checkpoints are whole, verified and free of anything but tensors and primitives."""

import enum
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_modules import atomic_file
from lightning_modules.checkpoint_io import (
    AtomicCheckpointIO,
    UnreadableCheckpointError,
    check_primitive,
    read_checkpoint,
)

CONTENT: dict[str, Any] = {
    "state_dict": OrderedDict(weight=torch.arange(20000.0), half=torch.ones(3, dtype=torch.bfloat16)),
    "epoch": 3,
    "names": ["a", ("b", None, True)],
    "milestones": Counter({3: 1}),
    "sizes": {torch.Size([2]), 1.5},
}


class Mode(enum.StrEnum):
    FULL = "FULL"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step_000003.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def test_what_is_written_is_read_back(path: Path) -> None:
    content = AtomicCheckpointIO().load_checkpoint(path)
    for name, value in CONTENT["state_dict"].items():
        assert torch.equal(content["state_dict"].pop(name), value)
    assert content == CONTENT | {"state_dict": {}}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated or damaged"),
        (lambda data: data[:-1], "truncated or damaged"),
        (lambda data: b"", "truncated or damaged"),
        (lambda data: bytes(len(data)), "truncated or damaged"),
        (lambda data: data[:40000] + bytes([data[40000] ^ 1]) + data[40001:], "checksum"),
        (lambda data: data[:20000] + bytes(20000) + data[40000:], "checksum"),
    ],
    ids=["half", "one byte short", "empty", "zeros", "one bit", "a hole"],
)
def test_a_damaged_file_is_named(path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UnreadableCheckpointError, match=reason) as raised:
        read_checkpoint(path)
    assert raised.value.path == path
    assert str(path) in str(raised.value)


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    torch.save({"state_dict": {}, "loss": partial(max, 1)}, tmp_path / "objects.ckpt")
    with pytest.raises(UnreadableCheckpointError, match="more than tensors and primitives"):
        read_checkpoint(tmp_path / "objects.ckpt")
    torch.save([torch.ones(2)], tmp_path / "list.ckpt")
    with pytest.raises(UnreadableCheckpointError, match="no state_dict"):
        read_checkpoint(tmp_path / "list.ckpt")
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(UnreadableCheckpointError):
        read_checkpoint(tmp_path / "other.ckpt")


def test_objects_are_never_unpickled_even_when_asked_for(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "loss": partial(max, 1)}, tmp_path / "objects.ckpt")
    with pytest.raises(UnreadableCheckpointError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "objects.ckpt", weights_only=False)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Mode.FULL, "Mode"),
        (np.float64(1.0), "float64"),
        (Path("a"), "Path"),
        (partial(torch.optim.Adam, lr=0.1), "partial"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_is_refused_and_found(path: Path, value: Any, name: str) -> None:
    before = path.read_bytes()
    content = CONTENT | {"hyper_parameters": {"a": [1, value]}}
    where = r"checkpoint\['hyper_parameters'\]\['a'\]\[1\] is a .*" + name
    with pytest.raises(TypeError, match=where):
        AtomicCheckpointIO().save_checkpoint(content, path)
    assert path.read_bytes() == before
    with pytest.raises(TypeError, match="a key of checkpoint is a"):
        check_primitive({value: 1} if name != "Linear" else {Mode.FULL: 1})


@pytest.mark.parametrize("point", ["write", "fsync", "replace"])
def test_a_failure_while_writing_keeps_the_good_file(
    path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no space left")

    before = path.read_bytes()
    if point == "write":
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(atomic_file.os, point, fail)
    with pytest.raises(OSError, match="no space left"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_removing_is_for_files_that_are_there_or_not(path: Path) -> None:
    AtomicCheckpointIO().remove_checkpoint(path)
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not path.exists()


def test_storage_options_are_refused(path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, path, storage_options={})


def test_a_member_that_became_a_directory_is_noticed(path: Path) -> None:
    """One flipped bit of the archive's own directory, for which torch would hand out unread memory."""
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(3)}}, path)
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")
    while b"/data/0" not in content[entry + 46 : entry + 46 + content[entry + 28]]:
        entry = content.find(b"PK\x01\x02", entry + 1)
    content[entry + 38] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpointError, match="marked as a directory"):
        read_checkpoint(path)


def test_no_flipped_bit_of_the_archives_directory_escapes(path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(3)}}, path)
    content = path.read_bytes()
    start = content.find(b"PK\x01\x02")
    for offset in range(start, len(content), 7):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 0x80]) + content[offset + 1 :])
        try:
            checkpoint = read_checkpoint(path)
        except UnreadableCheckpointError:
            continue
        assert torch.equal(checkpoint["state_dict"]["weight"], torch.ones(3))
