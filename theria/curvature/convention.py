"""How an attention callable wants to be called: order of dimensions, causal flag, place of the diagonal."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from theria.attention import scaled_dot_product_attention
from theria.attention.call import CausalAlignment
from theria.attention.registry import AttentionBackend

Layout = Literal["heads_first", "heads_last"]
"""(batch, heads, length, dim) as in PyTorch, or (batch, length, heads, dim) as in flash-attention."""

_CAUSAL_NAMES = ("is_causal", "causal")
_SCALE_NAMES = ("scale", "softmax_scale", "sm_scale")
_FITS = 0.1


class ConventionError(ValueError):
    """It cannot be told how the callable wants to be called."""


@runtime_checkable
class Attention(Protocol):
    """Softmax attention at scale 1 / sqrt(dim), (batch, heads, length, dim) throughout."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        """Softmax(Q Kᵀ / sqrt(dim)) V."""
        ...


@dataclass(frozen=True)
class Convention:
    """How to call a callable, and which masks it can do.

    Attributes:
        layout: order of the dimensions of its tensors.
        causal_argument: the keyword that switches the causal mask; None if there is none.
        scale_argument: the keyword that takes the scale; None leaves the callable's default.
        always_causal: it masks causally without being asked.
        alignment: where its causal diagonal starts when there are not as many keys as queries.
    """

    layout: Layout = "heads_first"
    causal_argument: str | None = None
    scale_argument: str | None = None
    always_causal: bool = False
    alignment: CausalAlignment = "upper_left"

    def can_mask(self, causal: bool) -> bool:
        """Whether the callable can be asked for a call with, or without, the causal mask."""
        return self.always_causal == causal if self.causal_argument is None else True

    def bind(self, function: Callable[..., Any]) -> Attention:
        """The callable under the one convention of the probes."""

        def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
            keywords: dict[str, bool | float] = {}
            if self.causal_argument is not None:
                keywords[self.causal_argument] = is_causal
            if self.scale_argument is not None:
                keywords[self.scale_argument] = query.shape[-1] ** -0.5
            if self.layout == "heads_first":
                return _tensor(function(query, key, value, **keywords))
            out = _tensor(function(*(t.transpose(1, 2) for t in (query, key, value)), **keywords))
            return out.transpose(1, 2) if out.ndim == 4 else out

        return attend


def as_backend(attention: Attention) -> AttentionBackend:
    """A callable under the convention of the probes as a backend of `theria.attention`.

    The backend raises NotImplementedError for what that convention has no word for: a window, shared heads, a
    scale other than 1 / sqrt(dim).
    """

    def backend(
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
        if window is not None or enable_gqa or not math.isclose(scale, query.shape[-1] ** -0.5):
            raise NotImplementedError(
                f"a bare attention(query, key, value, is_causal) takes no window, shared heads or scale; got"
                f" window={window}, enable_gqa={enable_gqa}, scale={scale:g} at dim {query.shape[-1]}"
            )
        return attention(query, key, value, is_causal=is_causal)

    return backend


def find_convention(
    function: Callable[..., Any],
    *,
    layout: Layout | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Convention:
    """Learn from a callable's signature and from its outputs how it wants to be called.

    The names of its arguments say how to ask for a causal mask and for a scale. The layout, a mask that is
    always there, and the alignment of the diagonal are read off its outputs: it is called with both orders
    of the dimensions, and one must give attention to within 10%. Where none does, the names decide:
    ``is_causal`` is PyTorch's, ``softmax_scale`` beside ``causal`` flash-attention's.

    Args:
        function: takes query, key and value first.
        layout: what is known already.
        device, dtype: of the tensors it is called with.

    Raises:
        ConventionError: for a signature that fits no attention, two names for one thing, or a layout that
            neither outputs nor names tell.
    """
    parameters = _argument_names(function)
    causal_argument = _only(function, parameters, _CAUSAL_NAMES)
    scale_argument = _only(function, parameters, _SCALE_NAMES)
    layouts: tuple[Layout, ...] = ("heads_first", "heads_last") if layout is None else (layout,)
    masks = (False, True) if causal_argument is None else (False,)
    answered, closest = False, math.inf
    for inputs in _square_inputs(device, dtype):
        for candidate in layouts:
            convention = Convention(candidate, causal_argument, scale_argument)
            out = _answer(convention.bind(function), inputs, causal=False)
            answered = answered or out is not None
            for always_causal in masks:
                error = _distance(out, inputs, always_causal)
                closest = min(closest, error)
                if error < _FITS:
                    found = Convention(candidate, causal_argument, scale_argument, always_causal)
                    return _aligned(found, function, device, dtype)
        if answered:
            break
    chosen = layout or _layout_of_names(causal_argument, scale_argument)
    if chosen is None and answered:
        raise ConventionError(
            f"cannot tell the layout of {_name(function)}: its output is attention over neither (batch,"
            f" heads, length, dim) nor (batch, length, heads, dim), the closer one is off by {closest:.0%};"
            " say which it takes with layout 'heads_first' or 'heads_last'"
        )
    return Convention(chosen or "heads_first", causal_argument, scale_argument)


def _argument_names(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments that can be given by keyword.

    Raises:
        ConventionError: if query, key and value are not all that must be given.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        # torch's built-in functions have their signature in their documentation alone
        first_lines = (function.__doc__ or "")[:1000]
        return set(re.findall(r"(\w+)=", first_lines))
    kinds = inspect.Parameter
    known = {*_CAUSAL_NAMES, *_SCALE_NAMES}
    positional = [
        p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    takes_three = len(positional) >= 3 or any(
        p.kind is kinds.VAR_POSITIONAL for p in signature.parameters.values()
    )
    extra = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p not in positional[:3] and p.name not in known
        if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    if not takes_three or extra:
        wanted = f"it also requires {', '.join(extra)}" if extra else f"its signature is {signature}"
        raise ConventionError(
            f"{_name(function)} cannot be called as attention(query, key, value): {wanted}; wrap it in a"
            " function that takes these three, and is_causal if it can"
        )
    return {p.name for p in signature.parameters.values() if p.kind is not kinds.POSITIONAL_ONLY}


def _only(function: Callable[..., Any], parameters: set[str], names: tuple[str, ...]) -> str | None:
    found = [name for name in names if name in parameters]
    if len(found) > 1:
        raise ConventionError(
            f"{_name(function)} has the arguments {' and '.join(found)}, which is ambiguous: wrap it in a"
            " function that has one of them"
        )
    return found[0] if found else None


def _layout_of_names(causal_argument: str | None, scale_argument: str | None) -> Layout | None:
    if causal_argument == "is_causal":
        return "heads_first"
    if (causal_argument, scale_argument) == ("causal", "softmax_scale"):
        return "heads_last"
    return None


def _square_inputs(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Inputs to look at outputs with; kernels that want whole tiles refuse the first."""
    for sizes in ((2, 3, 17, 16), (2, 3, 64, 64), (2, 3, 128, 128)):
        yield _normal(device, dtype, sizes, sizes, sizes)


def _normal(device: torch.device | str, dtype: torch.dtype, *sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator).to(device=device, dtype=dtype) for size in sizes)


def _answer(attention: Attention, inputs: tuple[Tensor, ...], *, causal: bool) -> Tensor | None:
    """The output, or None where the callable raises: it is someone else's and may raise anything."""
    try:
        with torch.no_grad():
            return attention(*(t.clone() for t in inputs), is_causal=causal)
    except Exception:
        return None


def _distance(
    out: Tensor | None, inputs: tuple[Tensor, ...], causal: bool, alignment: CausalAlignment = "upper_left"
) -> float:
    """Largest error relative to the largest output of attention in float64; infinite for another shape."""
    if out is None or out.shape != inputs[0].shape:
        return math.inf
    expected = scaled_dot_product_attention(
        *(t.double() for t in inputs), is_causal=causal, causal_alignment=alignment, backend="reference"
    )
    error = ((out.double() - expected).abs().max() / expected.abs().max()).item()
    return math.inf if math.isnan(error) else error


def _aligned(
    found: Convention, function: Callable[..., Any], device: torch.device | str, dtype: torch.dtype
) -> Convention:
    """The convention with the diagonal where the callable puts it for fewer queries than keys."""
    if not found.can_mask(causal=True):
        return found
    inputs = _normal(device, dtype, (1, 2, 13, 32), (1, 2, 40, 32), (1, 2, 40, 32))
    out = _answer(found.bind(function), inputs, causal=True)
    if _distance(out, inputs, True, "upper_left") >= _FITS > _distance(out, inputs, True, "lower_right"):
        return Convention(
            found.layout, found.causal_argument, found.scale_argument, found.always_causal, "lower_right"
        )
    return found


def _tensor(output: object) -> Tensor:
    """The output itself, or the first of several, as kernels that also return lse have it."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(f"attention must return a tensor, or a tuple that begins with one, got {type(first)}")
    return first


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
