"""Refusing impossible values by name."""

from collections.abc import Mapping


def check_at_least(**counts: tuple[int, int]) -> None:
    """Compare each count with the least that it may be.

    Raises:
        ValueError: one is below.
    """
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive(values: Mapping[str, float]) -> None:
    """Compare each number with 0.

    Raises:
        ValueError: one is not above.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
