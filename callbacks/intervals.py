"""How callbacks that act every n optimiser steps check n."""


def checked_interval(every_n_steps: int) -> int:
    """``every_n_steps`` itself.

    Raises:
        TypeError: it is not an int (True and 50.0 are not).
        ValueError: it is not positive.
    """
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int):
        raise TypeError(f"every_n_steps must be an int, got {every_n_steps!r}")
    if every_n_steps < 1:
        raise ValueError(
            f"every_n_steps must be at least 1, got {every_n_steps}; leave the callback out for never"
        )
    return every_n_steps
