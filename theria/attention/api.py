"""The attention function that models call, whatever computes it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from theria.attention.call import AttentionCall, autocasts, describe_call
from theria.attention.registry import AUTO, backend_function, select_backend

_logger = logging.getLogger(__name__)
_logged_choices: set[str] = set()
_records: list[set[str]] = []


# The tensors carry no jaxtyping shapes: the function refuses wrong shapes and dtypes by itself, in words.
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    window: int | None = None,
    causal_alignment: str = "upper_left",
    scale: float | int | None = None,
    enable_gqa: bool = False,
    backend: str = AUTO,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """O = softmax(scale Q Kᵀ + mask) V, exact in its derivatives of every order.

    The signature is that of ``torch.nn.functional.scaled_dot_product_attention`` with ``window``,
    ``causal_alignment`` and ``backend`` added. Differences: there is no other mask and no dropout, nothing is
    broadcast, and a query that sees no key gives zeros, with zero derivatives, under every backend. Under
    autocast the inputs are cast as torch casts them, and the backend computes in that dtype.

    Args:
        query: (..., query heads, queries, dim). Any number of leading dimensions, none included, which
            must be those of key and value; the heads are one of them, so (queries, dim) is a call too.
        key: (..., key-value heads, keys, dim).
        value: (..., key-value heads, keys, value_dim). Like query and key of float32, float64, bfloat16 or
            float16, on one device.
        is_causal: query i sees no key after its own position.
        window: a query sees the key at its own position and the ``window - 1`` before it; causal by itself.
        causal_alignment: where the diagonal starts when there are not as many keys as queries.
            "upper_left": query i stands at key i. "lower_right": the last query stands at the last key, as
            for a suffix of queries over cached keys.
        scale: factor of the scores, 1 / sqrt(dim) by default.
        enable_gqa: allow several query heads to a key-value head; consecutive query heads share one.
        backend: a name of ``available_backends()``, or "auto" for what ``resolve_backend`` answers, which
            is logged the first time it is chosen.
        attn_mask, dropout_p: as torch's, and refused but for None and 0.

    Returns:
        (..., query heads, queries, value_dim), in the dtype of the inputs.

    Raises:
        ValueError: for inputs that make no attention call, and for an unknown backend.
        TypeError: for a window that is not an integer or a scale that is not a number.
        NotImplementedError: if the backend is named and cannot do the call, or is not in this build; for a
            mask or dropout.
    """
    if attn_mask is not None or dropout_p:
        asked = "attn_mask" if attn_mask is not None else f"dropout_p={dropout_p}"
        raise NotImplementedError(
            f"no backend takes {asked}: supported are is_causal, causal_alignment and window, without dropout"
        )
    call = describe_call(
        query,
        key,
        value,
        is_causal=is_causal,
        window=window,
        causal_alignment=causal_alignment,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    name = select_backend(call, backend)
    # A logger's call would break the graph of torch.compile; the first call outside it logs.
    if backend == AUTO and not torch.compiler.is_compiling() and name not in _logged_choices:
        _log_choice(name, call)
    for record in _records:
        record.add(name)
    device_type = call.device.type
    lowered = autocasts(device_type)
    if lowered:
        query, key, value = (tensor.to(call.dtype) for tensor in (query, key, value))
    # A backend chooses its own precision, a float32 softmax for instance: autocast stays outside it.
    with torch.autocast(device_type, enabled=False) if lowered else nullcontext():
        return backend_function(name)(
            query,
            key,
            value,
            is_causal=call.is_causal,
            window=call.window,
            causal_alignment=call.causal_alignment,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )


def resolve_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    window: int | None = None,
    causal_alignment: str = "upper_left",
    scale: float | int | None = None,
    enable_gqa: bool = False,
    backend: str = AUTO,
) -> str:
    """The name of the backend that ``scaled_dot_product_attention`` takes for these arguments.

    A pure function of the arguments' attributes, the registered backends and autocast: "auto" gives
    triton_fused where it is registered and computes the call exactly, else reference; another name gives
    itself. It raises what the call would raise, and logs nothing.
    """
    call = describe_call(
        query,
        key,
        value,
        is_causal=is_causal,
        window=window,
        causal_alignment=causal_alignment,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return select_backend(call, backend)


@contextmanager
def recorded_backends() -> Iterator[set[str]]:
    """Collect the names of the backends that take calls inside a ``with`` block.

    Yields the set, which grows with the calls. Calls that are replayed from a CUDA graph or a compiled
    function are not made anew, and are seen where they are captured or traced.
    """
    record: set[str] = set()
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [other for other in _records if other is not record]


def _log_choice(name: str, call: AttentionCall) -> None:
    _logged_choices.add(name)
    _logger.info("attention backend 'auto' takes %r, first for %s", name, call)
