"""The diagonal Fisher information that scores divide by, and what is added to it where it is small."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FISHERS = ("a", "pooled", "pooled_n")
_DEFAULT_VALUES = {"relative": 1e-3, "absolute": 1e-8, "floor": 1e-10, "conditional": 1e-8}


class Denominator(NamedTuple):
    """What a tensor's entries are divided by, and what the ridge did to them.

    Attributes:
        value: I with the ridge.
        clamped: entries that the ridge raises because they lie below its threshold.
        exceeded: entries to which it adds more than they hold.
        zero: entries where I is 0, or below the smallest normal number of its dtype: they contribute nothing.
    """

    value: Float[Tensor, "*entries"]
    clamped: Bool[Tensor, "*entries"]
    exceeded: Bool[Tensor, "*entries"]
    zero: Bool[Tensor, "*entries"]


@dataclass(frozen=True)
class Ridge:
    """What keeps the division by a small I finite; element-wise, not a matrix ridge.

        relative     I + value mean(I), the mean over all heads of a layer's block, weight and bias together
        absolute     max(I, value / 100) + value; at the default 1e-8 entries are first raised to 1e-10
        floor        max(I, value)
        conditional  I + value where I < value / 10, I elsewhere

    A value of 0 divides by I itself. Some entries have no gradient but rounding errors, as the bias of keys
    without rotary positions, which moves all scores of a query alike: divided by their own I they would weigh
    as much as others in the signed and the symmetric score. A relative ridge keeps them out.

    Args:
        kind: one of these.
        value: of the ridge; None for 1e-3, 1e-8, 1e-10 and 1e-8.

    Raises:
        ValueError: for an unknown kind, or a value that is negative or not finite.
    """

    kind: str = "relative"
    value: float | int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _DEFAULT_VALUES:
            raise ValueError(
                f"ridge kind must be one of {', '.join(_DEFAULT_VALUES)}, received {self.kind!r}"
            )
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"ridge value must be finite and at least 0, received {self.value}")

    @property
    def strength(self) -> float:
        """The value, or the kind's default."""
        return float(_DEFAULT_VALUES[self.kind] if self.value is None else self.value)

    def denominator(self, fisher: Float[Tensor, "*entries"], mean: Float[Tensor, ""]) -> Denominator:
        """The divisor of entries of I, ``mean`` being that of their whole block."""
        strength = self.strength
        clamped = torch.zeros_like(fisher, dtype=torch.bool)
        if self.kind == "relative":
            value = fisher + strength * mean
        elif self.kind == "absolute":
            clamped = fisher < strength / 100
            value = fisher.clamp_min(strength / 100) + strength
        elif self.kind == "floor":
            clamped = fisher < strength
            value = fisher.clamp_min(strength)
        else:
            clamped = fisher < strength / 10
            value = torch.where(clamped, fisher + strength, fisher)
        zero = fisher < torch.finfo(fisher.dtype).tiny
        return Denominator(value, clamped, value - fisher > fisher, zero)


def as_ridge(ridge: Ridge | float | int) -> Ridge:
    """The ridge itself; a plain number is an absolute one."""
    return ridge if isinstance(ridge, Ridge) else Ridge("absolute", ridge)


def pooled_fisher(
    kind: str,
    sum_a: Float[Tensor, "*entries"],
    count_a: int,
    sum_b: Float[Tensor, "*entries"],
    count_b: int,
) -> Float[Tensor, "*entries"]:
    """I from sums of squared gradients over the samples of each task.

        a         I_A, the mean over task A
        pooled    (I_A + I_B) / 2
        pooled_n  the mean over all samples, (n_A I_A + n_B I_B) / (n_A + n_B)

    A task without samples has I = 0.
    """
    if kind == "a":
        return sum_a / max(count_a, 1)
    if kind == "pooled":
        return (sum_a / max(count_a, 1) + sum_b / max(count_b, 1)) / 2
    return (sum_a + sum_b) / max(count_a + count_b, 1)


def samples_behind(kind: str, count_a: int, count_b: int) -> int:
    """Samples that the least supported mean in I is taken over."""
    return {"a": count_a, "pooled": min(count_a, count_b), "pooled_n": count_a + count_b}[kind]
