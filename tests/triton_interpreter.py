"""Triton's interpreter without the work that it repeats.

For every launch it puts its own operations in the place of the language's, and for every call of one kernel
function by another it looks all of them up and does so again, which takes half of a test's time.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


def replace_language_once_a_launch() -> None:
    """Leave the language as it is where a call would only replace what the launch has replaced."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace: Callable[[Any], Any] = interpreter._patch_lang

    @functools.cache
    def used_by(function: Any) -> list[ModuleType]:
        return [module for module in (tl, tl.core) if any(module is v for v in function.__globals__.values())]

    def replace_once(function: Any) -> Any:
        # outside of a launch `tl` is the language's own
        if any(tl.core.is_builtin(module.load) for module in (tl, *used_by(function))):
            return replace(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
