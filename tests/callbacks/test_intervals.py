import pytest

from callbacks import AttentionGradLogger, CUDAMemoryStats
from callbacks.intervals import checked_interval


@pytest.mark.parametrize("check", [checked_interval, AttentionGradLogger, CUDAMemoryStats])
def test_an_interval_is_a_positive_integer(check) -> None:
    for wrong_type in (True, 50.0, "50", None):
        with pytest.raises(TypeError, match=f"every_n_steps must be an int, got {wrong_type!r}"):
            check(wrong_type)
    for too_small in (0, -5):
        with pytest.raises(ValueError, match=f"every_n_steps must be at least 1, got {too_small}"):
            check(too_small)


def test_an_interval_comes_back_unchanged() -> None:
    assert [checked_interval(n) for n in (1, 50)] == [1, 50]
