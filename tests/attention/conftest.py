"""An independent statement of attention, in Python floats, for every backend's tests."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from theria.attention import registry

NaiveAttention = Callable[..., Tensor]


@pytest.fixture
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry of a build in which nothing but reference is available."""
    monkeypatch.setattr(registry, "_registered", {"reference": registry._registered["reference"]})


@pytest.fixture(scope="session")
def naive_attention() -> NaiveAttention:
    """The arguments of ``scaled_dot_product_attention``, one row and one key at a time, in float64."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        window: int | None = None,
        causal_alignment: str = "upper_left",
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        queries, keys, dim = query.shape[-2], key.shape[-2], query.shape[-1]
        scale = 1 / math.sqrt(dim) if scale is None else scale
        out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=torch.float64)
        for index in itertools.product(*(range(size) for size in query.shape[:-2])):
            shared = index
            if enable_gqa:
                shared = (*index[:-1], index[-1] // (query.shape[-3] // key.shape[-3]))
            for i in range(queries):
                own = i + keys - queries if causal_alignment == "lower_right" else i
                weights = {}
                for j in range(keys):
                    if (is_causal or window is not None) and j > own:
                        continue
                    if window is not None and own - j >= window:
                        continue
                    products = (
                        query[(*index, i, c)].item() * key[(*shared, j, c)].item() for c in range(dim)
                    )
                    weights[j] = math.exp(scale * sum(products))
                total = sum(weights.values())
                for j, weight in weights.items():
                    out[(*index, i)] += weight / total * value[(*shared, j)].double()
        return out

    return attend
