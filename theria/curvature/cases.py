"""The calls that an implementation is probed with."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from theria.curvature.convention import Layout

Query = Float[Tensor, "batch heads queries dim"]
Key = Float[Tensor, "batch heads keys dim"]
Out = Float[Tensor, "batch heads queries dim"]


@dataclass(frozen=True)
class Case:
    """One attention call: sizes, mask, and what has made fused kernels go wrong before.

    Attributes:
        batch, heads, queries, keys, dim: sizes; query (batch, heads, queries, dim), key and value alike.
        causal: under the causal mask.
        magnitude: standard deviation of query and key, so that of the scores is its square.
        strided: inputs are views whose memory is laid out the other way (heads and length swapped).
        uniform_cotangent: the output's cotangent is one number expanded, as ``out.sum()`` gives it.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = False
    magnitude: float = 1.0
    strided: bool = False
    uniform_cotangent: bool = False

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads}, {self.queries} queries, {self.keys} keys, dim {self.dim}"
        flags = {
            "causal": self.causal,
            f"magnitude {self.magnitude:g}": self.magnitude != 1,
            "strided": self.strided,
            "uniform cotangent": self.uniform_cotangent,
        }
        return ", ".join([sizes, *(name for name, on in flags.items() if on)])


# Odd lengths, one query as in the sequence classifier, more and fewer queries than keys, peaked and flat
# softmax, lengths of more than one tile, one of them whole tiles.
_CASES = (
    Case(2, 3, 17, 17, 16),
    Case(2, 3, 17, 17, 24, causal=True),
    Case(1, 2, 1, 33, 64),
    Case(1, 2, 13, 40, 32, strided=True),
    Case(1, 2, 13, 40, 32, causal=True),
    Case(1, 2, 40, 13, 32),
    Case(1, 2, 33, 33, 64, magnitude=3.0),
    Case(1, 2, 33, 33, 64, causal=True, magnitude=3.0, strided=True),
    Case(2, 2, 24, 24, 16, magnitude=0.1),
    Case(2, 2, 24, 24, 16, causal=True, uniform_cotangent=True),
    Case(1, 1, 128, 128, 64),
    Case(1, 1, 160, 160, 16, causal=True),
)
_LONG_CASES = (Case(1, 2, 1000, 1000, 64), Case(1, 2, 1024, 1024, 64, causal=True))

SMALL_CASES = (
    Case(1, 1, 9, 9, 16),
    Case(1, 2, 9, 9, 16, causal=True),
    Case(1, 1, 1, 12, 16),
    Case(1, 1, 5, 12, 16, causal=True, strided=True),
    Case(1, 1, 9, 9, 16, magnitude=3.0),
    Case(1, 1, 70, 70, 16, causal=True, uniform_cotangent=True),
)
"""For implementations that take milliseconds a tile, as kernels do under Triton's interpreter."""


def default_cases(device: torch.device | str) -> tuple[Case, ...]:
    """What `audit` probes; a GPU also gets lengths at which kernels are chosen differently."""
    return _CASES + _LONG_CASES if torch.device(device).type == "cuda" else _CASES


class Sample(NamedTuple):
    """Inputs of a case, the cotangent of its output, and a direction in the space of the inputs."""

    query: Query
    key: Key
    value: Key
    cotangent: Out
    directions: tuple[Query, Key, Key]

    @property
    def inputs(self) -> tuple[Query, Key, Key]:
        """query, key and value."""
        return self.query, self.key, self.value

    def double(self) -> "Sample":
        """The same numbers in float64."""
        query, key, value = (t.double() for t in self.inputs)
        a, b, c = (t.double() for t in self.directions)
        return Sample(query, key, value, self.cotangent.double(), (a, b, c))


def draw(case: Case, *, layout: Layout, device: torch.device | str, dtype: torch.dtype, seed: int) -> Sample:
    """Normal numbers, the same on every device, whose memory is contiguous in ``layout``.

    With ``case.strided`` it is contiguous in the other layout instead.
    """
    generator = torch.Generator().manual_seed(seed)
    heads_last = (layout == "heads_last") != case.strided
    lengths = (case.queries, case.keys, case.keys, case.queries, case.queries, case.keys, case.keys)
    deviations = (case.magnitude, case.magnitude, 1, 1, 1, 1, 1)
    tensors = []
    for length, deviation in zip(lengths, deviations, strict=True):
        values = deviation * torch.randn(case.batch, case.heads, length, case.dim, generator=generator)
        values = values.to(device=device, dtype=dtype)
        tensors.append(values.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else values)
    query, key, value, cotangent, a, b, c = tensors
    if case.uniform_cotangent:
        cotangent = torch.ones((), dtype=dtype, device=device).expand(cotangent.shape)
    return Sample(query, key, value, cotangent, (a, b, c))
