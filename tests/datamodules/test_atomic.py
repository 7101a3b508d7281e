"""A cache file is whole or not there, also where two writers meet."""

from pathlib import Path

import pytest

from datamodules.atomic import replace_when_written


def test_writers_that_meet_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replace_when_written(path) as first:
        first.write_text("first")
        with replace_when_written(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replace_when_written(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
