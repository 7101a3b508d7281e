"""What an attention call asks for, checked and normalised, without its data."""

import math
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

CausalAlignment = Literal["upper_left", "lower_right"]

_ALIGNMENTS = get_args(CausalAlignment)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class AttentionCall(NamedTuple):
    """Everything a backend may decide on; two calls with equal descriptions take the same backend.

    The values are normalised: ``is_causal`` is true wherever a window is given, ``scale`` is a number.
    Under ``torch.func.vmap`` the shapes are those seen inside it, without the mapped dimensions.
    """

    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_causal: bool
    window: int | None
    causal_alignment: CausalAlignment
    scale: float
    enable_gqa: bool

    def __str__(self) -> str:
        shapes = (
            f"query {tuple(self.query_shape)}, key {tuple(self.key_shape)}, value {tuple(self.value_shape)}"
        )
        return (
            f"{shapes}, {self.dtype} on {self.device}, is_causal={self.is_causal}, window={self.window}, "
            f"causal_alignment={self.causal_alignment!r}, scale={self.scale:g}, enable_gqa={self.enable_gqa}"
        )


def describe_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    window: int | None,
    causal_alignment: str,
    scale: float | int | None,
    enable_gqa: bool,
) -> AttentionCall:
    """Check the arguments of ``scaled_dot_product_attention`` and describe the call.

    Under autocast the dtype described is the one that the inputs are to be cast to. Only attributes are
    compared, never data: meta-learning calls attention hundreds of times a step on tensors so small that
    a tensor operation here would show.

    Raises:
        ValueError: for ranks, shapes, dtypes, devices or values that make no attention call.
        TypeError: for inputs that are no tensors, a window that is not an integer, an ``is_causal`` that is
            not a bool, or a scale that is not a number.
    """
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        raise TypeError("query, key and value must be tensors, received " + _types(query, key, value))
    device = query.device
    dtypes: tuple[torch.dtype, ...] = (query.dtype, key.dtype, value.dtype)
    if autocasts(device.type):
        dtypes = tuple(_autocast_dtype(dtype, device.type) for dtype in dtypes)
    dtype = dtypes[0]
    if dtypes.count(dtype) != 3:
        raise ValueError(f"query, key and value must share one dtype, received {', '.join(map(str, dtypes))}")
    if dtype not in _DTYPES:
        supported = ", ".join(str(supported) for supported in _DTYPES)
        raise ValueError(f"attention needs one of the dtypes {supported}, received {dtype}")
    if not (device == key.device == value.device):
        raise ValueError(
            f"query, key and value must be on one device, received {device}, {key.device} and {value.device}"
        )
    shapes = query.shape, key.shape, value.shape
    _check_shapes(*shapes, enable_gqa=enable_gqa)

    if window is not None:
        if not isinstance(window, int) or isinstance(window, bool):
            raise TypeError(f"window must be an integer or None, received {window!r}")
        if window < 1:
            raise ValueError(
                f"window counts the keys a query sees, itself included, and must be at least 1, got {window}"
            )
        # a window that reaches past every key sees no more, and fits an index
        window = min(window, max(query.shape[-2], key.shape[-2], 1))
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, received {is_causal!r}")
    if causal_alignment not in _ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {_ALIGNMENTS}, received {causal_alignment!r}")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, received {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, received {scale}")
    return AttentionCall(
        *shapes,
        dtype,
        device,
        is_causal or window is not None,
        window,
        cast(CausalAlignment, causal_alignment),
        float(scale),
        enable_gqa,
    )


def diagonal_offset(queries: int, keys: int, alignment: CausalAlignment) -> int:
    """The key that the first query stands at: 0, or keys - queries where the last stands at the last."""
    return keys - queries if alignment == "lower_right" else 0


def _types(*values: object) -> str:
    return ", ".join(type(value).__name__ for value in values)


def autocasts(device_type: str) -> bool:
    """True where attention on this type of device is called under ``torch.autocast``."""
    # what asks for a device's support cannot be traced, and what is traced is on a device that computes
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def _autocast_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """What torch's autocast makes of an input to an operation it lowers: float64 and integers stay."""
    if dtype == torch.float64 or not dtype.is_floating_point:
        return dtype
    return torch.get_autocast_dtype(device_type)


def _check_shapes(query: torch.Size, key: torch.Size, value: torch.Size, *, enable_gqa: bool) -> None:
    def refuse(expected: str) -> ValueError:
        return ValueError(
            f"{expected}, received query {tuple(query)}, key {tuple(key)} and value {tuple(value)}"
        )

    rank = len(query)
    least = 3 if enable_gqa else 2
    if not (rank == len(key) == len(value)) or rank < least:
        layout = "(..., heads, length, width)" if enable_gqa else "(..., length, width)"
        raise refuse(f"query, key and value must share one rank of at least {least}, {layout}")
    if query[-1] != key[-1] or query[-1] < 1:
        raise refuse("query and key must share a last dimension of at least 1")
    if key[:-1] != value[:-1]:
        raise refuse("key and value must agree in every dimension but the last")
    if enable_gqa and (key[-3] < 1 or query[-3] < 1):
        raise refuse("enable_gqa needs at least one query head and one key-value head")
    if query[:-2] == key[:-2]:
        return
    if not enable_gqa:
        raise refuse(
            "query and key must agree in every dimension before the last two (nothing is broadcast; "
            "fewer key-value heads than query heads need enable_gqa=True)"
        )
    if query[:-3] != key[:-3]:
        raise refuse("query and key must agree in every dimension before the heads (nothing is broadcast)")
    if query[-3] % key[-3] != 0:
        raise refuse("the number of query heads must be a multiple of the number of key-value heads")
