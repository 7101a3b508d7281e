"""Kinds of samples are numbered without gaps and have their share of any beginning."""

from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.shares import allocate, as_fraction, domain_shares

SHARES = (
    st.lists(st.integers(0, 20), min_size=1, max_size=5)
    .filter(any)
    .map(lambda weights: [Fraction(weight, sum(weights)) for weight in weights])
)


@settings(deadline=None, derandomize=True)
@given(SHARES)
def test_kinds_are_numbered_without_gaps_and_have_their_share_of_any_beginning(
    shares: list[Fraction],
) -> None:
    counts: Counter[int] = Counter()
    for number in range(200):
        kind, before = allocate(number, shares)
        assert before == counts[kind]
        counts[kind] += 1
        for other, share in enumerate(shares):
            assert abs(counts[other] - (number + 1) * share) < len(shares)
    far = 10**15
    kind, before = allocate(far, shares)
    assert abs(before - far * shares[kind]) < len(shares)


def test_weights_become_exact_parts_of_one() -> None:
    assert domain_shares({"a": 0.1, "b": 0.3}) == [Fraction(1, 4), Fraction(3, 4)]
    assert sum(domain_shares({"a": 1 / 3, "b": 2**0.5, "c": 7.0})) == 1
    assert as_fraction(0.25) == Fraction(1, 4)
    assert as_fraction(0.1) == Fraction(1, 10)
