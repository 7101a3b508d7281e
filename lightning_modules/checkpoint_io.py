"""Checkpoints on disk: written atomically, verified when read, tensors and primitives only."""

import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor

from lightning_modules.atomic_file import atomic_file

_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Tensor,
    torch.nn.Parameter,
    torch.dtype,
    torch.device,
)


class UnreadableCheckpointError(ValueError):
    """A file that is no complete checkpoint of tensors and primitives; `path` names it, `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as a checkpoint: {reason}")
        self.path = path
        self.reason = reason


_DIRECTORY_ATTRIBUTE = 0x10  # of MS-DOS, which zip archives keep


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files, but a kill or a full disk never leaves half of one under its name.

    Lightning's own writer goes through the system's temporary directory; from another file system it then
    truncates the good file in place, and nothing is synchronised to the disk. Local paths only.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            TypeError: something in it is neither a tensor nor a primitive; the message names where.
            OSError: the system does not let it be written; what stood at `path` is still there.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options, got {storage_options!r}")
        check_primitive(checkpoint)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            _save(checkpoint, file)

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read as `read_checkpoint` does, tensors and primitives only whatever `weights_only` says."""
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: _PATH) -> None:
        """Delete the checkpoint at `path`, if it is there."""
        Path(path).unlink(missing_ok=True)


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's archive writer stumbles over its own position after a disk has refused a part
        cause = error.__context__
        if isinstance(cause, OSError):
            raise cause from None
        raise


def read_checkpoint(path: Path, map_location: Any | None = "cpu") -> dict[str, Any]:
    """The checkpoint at `path`, verified against the checksums its zip archive keeps.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableCheckpointError: it is truncated, damaged, no checkpoint, or holds other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    try:
        # torch.load looks at the archive's directory but not at its checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # torch reads nothing from a member whose attributes call it a directory
            directories = [member.filename for member in archive.infolist() if _is_directory(member)]
    except Exception as error:  # a damaged archive directory raises whatever its bytes lead to
        raise UnreadableCheckpointError(path, "the file is truncated or damaged") from error
    if damaged is not None:
        raise UnreadableCheckpointError(path, f"the checksum of its member {damaged} is wrong")
    if directories:
        raise UnreadableCheckpointError(path, f"its member {directories[0]} is marked as a directory")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # likewise
        raise UnreadableCheckpointError(path, "it holds more than tensors and primitives") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UnreadableCheckpointError(path, "it has no state_dict")
    return checkpoint


def _is_directory(member: zipfile.ZipInfo) -> bool:
    return member.is_dir() or bool(member.external_attr & _DIRECTORY_ATTRIBUTE)


def check_primitive(value: Any, where: str = "checkpoint") -> None:
    """Raise a TypeError naming the first object inside `value` that `weights_only=True` could not read back.

    Types are compared exactly: an Enum of strings or a numpy float is an instance of a primitive and
    still unreadable.
    """
    if type(value) in _LEAVES:
        return
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            check_primitive(key, f"a key of {where}")
            check_primitive(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set, torch.Size):
        for index, item in enumerate(value):
            check_primitive(item, f"{where}[{index}]")
    else:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds tensors "
            "and primitives only: store a number, a string, or a list or dict of them instead"
        )
