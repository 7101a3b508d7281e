"""Which calls of theria are checked in tests.

Shapes hold between the arguments of a call: a function that declares some is jaxtyping's. Any other is
beartype's alone, which takes a tenth of the time. What is defined inside a function and declares no shapes is
left as it is: decorating it anew at every call of the outer function takes longer than most of these calls.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from jaxtyping import AbstractArray

_jaxtyped = jaxtyping.jaxtyped


def check_at_run_time(package: str) -> None:
    """Check the calls of a package that is not imported yet."""
    # the import hook decorates everything with what stands under this name
    jaxtyping.jaxtyped = checked
    jaxtyping.install_import_hook(package, "beartype.beartype")


def checked(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """A decorator of functions, methods, properties and classes."""

    def decorate(what: Any) -> Any:
        if not inspect.isfunction(what) or _declares_shapes(what):
            return _jaxtyped(what, typechecker=typechecker)
        return what if "<locals>" in what.__qualname__ else typechecker(what)

    return decorate


def _declares_shapes(function: Callable[..., Any]) -> bool:
    return any(_has_shape(hint) for hint in function.__annotations__.values())


def _has_shape(hint: Any) -> bool:
    # of a name that is defined later nobody knows
    is_shape = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return isinstance(hint, str) or is_shape or any(map(_has_shape, getattr(hint, "__args__", ())))
