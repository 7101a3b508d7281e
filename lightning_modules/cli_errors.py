"""Wrong input on the command line ends with one line."""

import errno
import re
import sys
import traceback
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

# Lines of jsonargparse's reports that say what types there are, not what is wrong.
_NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Not a valid subclass of",
    "Subclass types expect one of",
    "a class path (str)",
    "a dict with",
    "Given value",
)

_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


_EXTRAS = {"wandb": "wandb", "psutil": "monitor"}
"""Which extra of theria brings an optional package."""


def fail(message: str, status: int = 2) -> NoReturn:
    """Write one line to stderr and leave with this status, 2 for wrong input."""
    sys.stderr.write(f"theria: error: {condense(message)}\n")
    raise SystemExit(status)


class OneLineParser(LightningArgumentParser):
    """A parser that says in one line what is wrong with its input."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with that line."""
        fail(message)


def condense(message: str) -> str:
    """One line of what jsonargparse says about a value that it refused or a constructor that raised.

    Its report names the key, then every type that the value could have had, each with what spoke against
    it. Kept are the key, the first reason, which is that of the intended type, and the value if it is a
    plain one.
    """
    key, value = "", ""
    reasons = []
    for line in filter(None, (line.strip() for line in message.splitlines())):
        if match := re.fullmatch(r'Parser key "(.+?)":(.*)', line):
            key = f"{match[1]}: "
            reasons.append(match[2].strip())
        elif match := re.fullmatch(r"Given value: ([^\[({]{1,80})", line):
            value = match[1]
        elif not line.removeprefix("- ").startswith(_NOISE):
            reasons.append(line.removeprefix("- "))
    reasons = list(filter(None, reasons))
    if "Union subtypes" in message and reasons:
        # a constructor that raised says why on the line behind
        reasons = reasons[: 2 if reasons[0].endswith(":") else 1]
    reason = " ".join(reasons)
    got = f"; got {value}" if value not in reason else ""
    return key + _in_plain_words(reason) + got


def is_about_settings(error: Exception) -> bool:
    """Whether an exception out of a run blames what the user configured rather than a fault in the code.

    So does Lightning's own type for it, and so does a check of values that fails outside of the steps: of an
    optimiser that is built, a loader that is set up, a position that is restored. In a step too, what is not
    implemented is a backend or a kernel that was named; and what Lightning misses is a package.
    """
    if isinstance(error, MisconfigurationException):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    in_a_step = any(frame.name in ("training_step", "validation_step", "test_step") for frame in frames)
    is_a_check = bool(frames) and (frames[-1].line or "").startswith("raise ")
    if isinstance(error, ModuleNotFoundError):
        return "Requirement '" in str(error)
    if isinstance(error, NotImplementedError):
        return is_a_check
    return isinstance(error, ValueError | TypeError) and is_a_check and not in_a_step


def is_about_the_disk(error: Exception) -> bool:
    """Whether an exception says that the system does not let files be written here."""
    return isinstance(error, OSError) and error.errno in _DISK


def _in_plain_words(reason: str) -> str:
    missing = re.search(r"Requirement '(\w+)[^']*' not met", reason)
    if missing and missing[1] in _EXTRAS:
        return f"{missing[1]} is not installed: pip install 'theria[{_EXTRAS[missing[1]]}]'"
    reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason)
    return re.sub(
        r"Expected a dot import path string: (\S+)",
        r"there is no class \1; give a known name or an import path",
        reason,
    )
