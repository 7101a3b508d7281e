"""A file is whole or not there."""

import os
from pathlib import Path

import pytest

from lightning_modules import atomic_file as module
from lightning_modules.atomic_file import atomic_file, remove_leftovers


def test_the_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, object]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("fsync", target, target.stat().st_size if target.is_file() else None))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append(("replace", source, target))
        real_replace(source, target)

    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(module.os, "replace", replace)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"12345")
    temporary = tmp_path / "file.tmp"
    assert calls == [
        ("fsync", temporary, 5),
        ("replace", temporary, tmp_path / "file"),
        ("fsync", tmp_path, None),
    ]


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a.ckpt", "a.ckpt.tmp", "b.tmp", "c.tmp.ckpt"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "c.tmp.ckpt"]
