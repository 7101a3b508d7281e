"""Shares of several kinds in a stream of samples, exact over any number of them."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from theria.tasks.philox import WORD_BITS

_LARGEST_DENOMINATOR = 10**6


def domain_shares(weights: Mapping[str, float]) -> list[Fraction]:
    """Weights as exact parts of 1."""
    exact = [as_fraction(weight / sum(weights.values())) for weight in weights.values()]
    return [weight / sum(exact) for weight in exact]


def as_fraction(value: float) -> Fraction:
    """The number as it was written, so that sums over many samples do not round."""
    return Fraction(value).limit_denominator(_LARGEST_DENOMINATOR)


def allocate(number: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """The kind of sample `number` >= 0, and how many of that kind are before it.

    One kind after the other takes floor(m s) of the first m samples that the kinds before it leave, where s
    is its part of what they leave. So counts have a closed form, and of the first N samples kind k has
    N share_k, up to less than the number of kinds.
    """
    left = Fraction(1)
    for kind, share in enumerate(shares[:-1]):
        part = share / left
        before = number * part.numerator // part.denominator
        if (number + 1) * part.numerator // part.denominator > before:
            return kind, before
        number -= before
        left -= share
    return len(shares) - 1, number


def pick(shares: Sequence[Fraction], word: int) -> int:
    """A kind at random by its share, from a word of 32 bits."""
    below = Fraction(0)
    for kind, share in enumerate(shares):
        below += share
        if word < below * 2**WORD_BITS:
            return kind
    raise ValueError(f"the shares {shares} do not add up to 1")
