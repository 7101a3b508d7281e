"""The backends of attention by name, and which of them takes a call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from theria.attention.call import AttentionCall, CausalAlignment

AUTO = "auto"
"""The name that lets the call decide."""

FALLBACK = "reference"
"""What ``auto`` takes where nothing faster computes the call exactly."""

_FASTEST_FIRST = ("triton_fused",)
_KNOWN = (FALLBACK, "custom", "triton_fused")


@runtime_checkable
class AttentionBackend(Protocol):
    """A function that computes attention for a call that has been checked and normalised.

    It receives ``is_causal=True`` with every window and the scale as a number, so that these arguments
    are also valid arguments of ``scaled_dot_product_attention``: a variant may wrap another backend by
    passing them on. It returns (..., heads, queries, value_dim) in the dtype of the query, and never
    detaches.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool,
        window: int | None,
        causal_alignment: CausalAlignment,
        scale: float,
        enable_gqa: bool,
    ) -> Tensor:
        """Softmax(scale Q Kᵀ) V over the visible keys."""
        ...


Supports = Callable[[AttentionCall], str | None]
"""Why a backend cannot do a call, as "it supports ..., not ...", or None where it can."""


class _Registration(NamedTuple):
    function: AttentionBackend
    supports: Supports | None
    automatic: Callable[[AttentionCall], bool]


_registered: dict[str, _Registration] = {}


def register_backend(
    name: str,
    function: AttentionBackend,
    *,
    supports: Supports | None = None,
    automatic: Callable[[AttentionCall], bool] = lambda call: True,
    replace: bool = False,
) -> None:
    """Make ``function`` selectable as ``backend=name``.

    Args:
        name: what callers write; "auto" is taken.
        function: computes the attention, see ``AttentionBackend``.
        supports: returns None for a call the backend computes exactly, else the reason it cannot, which
            should say what is supported: it becomes part of the error. It must depend on the description
            alone. Without it the backend takes every valid call.
        automatic: of the calls it supports, those that "auto" may give to a backend it looks for.
        replace: allow a name that is registered already.

    Raises:
        ValueError: if the name is empty or "auto", or registered already and ``replace`` is False.
    """
    if not name or name == AUTO:
        raise ValueError(f"a backend needs a name other than {AUTO!r} and the empty one, received {name!r}")
    if name in _registered and not replace:
        raise ValueError(f"attention backend {name!r} is registered already; pass replace=True to replace it")
    _registered[name] = _Registration(function, supports, automatic)


@contextmanager
def registered_backend(
    name: str,
    function: AttentionBackend,
    *,
    supports: Supports | None = None,
    automatic: Callable[[AttentionCall], bool] = lambda call: True,
    replace: bool = False,
) -> Iterator[str]:
    """Register a backend for the length of a ``with`` block, then restore what the name meant before.

    Takes the arguments of ``register_backend`` and raises what it raises; yields the name.
    """
    before = _registered.get(name)
    register_backend(name, function, supports=supports, automatic=automatic, replace=replace)
    try:
        yield name
    finally:
        if before is None:
            del _registered[name]
        else:
            _registered[name] = before


def available_backends() -> tuple[str, ...]:
    """Names that ``backend`` accepts in this process besides "auto", in the order of registration."""
    return tuple(_registered)


def check_backend_name(name: str) -> None:
    """Raise where ``backend=name`` can work for no call at all.

    Raises:
        NotImplementedError: for a backend of theria that is not available in this build.
        ValueError: for any other unknown name.
    """
    if name == AUTO or name in _registered:
        return
    choices = f"available here: {', '.join((*_registered, AUTO))}"
    if name in _KNOWN:
        raise NotImplementedError(f"attention backend {name!r} is not available in this build; {choices}")
    raise ValueError(f"unknown attention backend {name!r}; {choices}")


def select_backend(call: AttentionCall, name: str) -> str:
    """The backend that computes ``call`` when ``name`` is asked for.

    Raises:
        NotImplementedError: if the backend cannot do the call or is not available in this build.
        ValueError: if no backend has this name.
    """
    check_backend_name(name)
    if name == AUTO:
        name = next((fast for fast in _FASTEST_FIRST if _is_automatic(fast, call)), FALLBACK)
    reason = refusal(name, call)
    if reason is not None:
        raise NotImplementedError(
            f"attention backend {name!r} cannot do this call: {reason}. Received {call}"
        )
    return name


def backend_function(name: str) -> AttentionBackend:
    """The function registered as ``name``, a name that ``select_backend`` returned."""
    return _registered[name].function


def refusal(name: str, call: AttentionCall) -> str | None:
    """Why the registered backend ``name`` cannot do ``call``; None where it can."""
    supports = _registered[name].supports
    return None if supports is None else supports(call)


def _is_automatic(name: str, call: AttentionCall) -> bool:
    backend = _registered.get(name)
    return backend is not None and refusal(name, call) is None and backend.automatic(call)
