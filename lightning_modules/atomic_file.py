"""Files that are either whole or not there, whatever kills the process that writes them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` once it is complete and on the disk.

    The temporary file stands in the same directory, so that the replacement never crosses a file system.
    An exception inside the block leaves `path` as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # of a full disk the system does not say where
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files that a killed process left in `directory`."""
    for temporary in directory.glob("*" + TEMPORARY_SUFFIX):
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    # Without this the new name itself may be lost with the power.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
