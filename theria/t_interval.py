"""Student's t-interval of a mean."""

import math
from typing import TypeVar

from scipy import stats
from torch import Tensor

Deviation = TypeVar("Deviation", float, Tensor)


def t_half_width(deviation: Deviation, count: int, confidence: float = 0.95) -> Deviation:
    r"""Half of the interval of the mean of ``count`` independent draws.

    .. math:: t_{(1 + c)/2,\,n - 1} \, s / \sqrt n

    Args:
        deviation: s, the standard deviation of the draws with n - 1 in its denominator; of several means at
            once as a tensor.
        count: n.
        confidence: c.

    Returns:
        In the unit of the deviation; NaN for fewer than two draws, where t has no quantile.
    """
    return deviation * float(stats.t.ppf((1 + confidence) / 2, count - 1) / math.sqrt(count))
