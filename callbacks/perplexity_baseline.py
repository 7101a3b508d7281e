"""What perplexity is usual, and which step is out of the ordinary."""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

MAX_LOG_PERPLEXITY = 20.0
# Of normally distributed numbers, the standard deviation over the median absolute deviation.
_SIGMA_PER_MAD = 1.4826


class Judgement(NamedTuple):
    """How one step stands to the baseline of the steps before it.

    Attributes:
        perplexity: exp(min(loss, 20)).
        ppl_delta: (perplexity - ema) / ema, 0 where nothing came before.
        z_score: distance of log-perplexity from the window's median, in robust standard deviations.
        is_spike: ``ppl_delta`` is above the threshold.
        is_outlier: a spike whose ``z_score`` is above its limit too, after the warm-up; or not finite.
    """

    perplexity: float
    ppl_delta: float
    z_score: float
    is_spike: bool
    is_outlier: bool


class PerplexityBaseline:
    r"""An exponential mean of perplexity beside a robust scale of its logarithm; outliers are not absorbed.

    .. math::
        \mathrm{ema}_t = \mathrm{ema}_{t-1} + a_t (p_t - \mathrm{ema}_{t-1}), \quad
        a_t = \max(1/t, 2/(n+1)); \qquad
        z_t = \frac{\log p_t - \mathrm{median}}{1.4826\,\mathrm{MAD}}

    with the plain mean while fewer steps than about n / 2 came, and median and MAD over the last n steps.

    A rise that is large but usual (noisy batches) is a spike and no outlier, and one that is unusual but
    small (a loss that has all but stopped to move) is neither: both are absorbed, so that the baseline
    follows wherever training goes by small steps.

    Args:
        steps: n, the span of the mean and the length of the window.
        warm_up: steps that are absorbed before any can be an outlier.
        threshold: of ``ppl_delta``.
        z_limit: of ``z_score``.
    """

    def __init__(
        self, steps: int = 100, warm_up: int = 100, threshold: float = 0.05, z_limit: float = 6.0
    ) -> None:
        self.rate = 2 / (steps + 1)
        self.warm_up = warm_up
        self.threshold = threshold
        self.z_limit = z_limit
        self.ema = math.nan
        self._absorbed = 0
        self._window: deque[float] = deque(maxlen=steps)

    @property
    def is_warm(self) -> bool:
        """Whether enough steps were absorbed to judge by."""
        return self._absorbed >= self.warm_up

    def judge(self, loss: float) -> Judgement:
        """Compare a step's loss (in nats) with the baseline, then absorb it unless it is an outlier."""
        log_perplexity = min(loss, MAX_LOG_PERPLEXITY) if not math.isnan(loss) else math.nan
        perplexity = math.exp(log_perplexity)
        if not math.isfinite(loss):
            return Judgement(perplexity, self._delta(perplexity), math.nan, True, True)
        ppl_delta, z_score = self._delta(perplexity), self._z_score(log_perplexity)
        is_spike = ppl_delta > self.threshold
        is_outlier = is_spike and self.is_warm and z_score > self.z_limit
        if not is_outlier:
            self._absorb(perplexity, log_perplexity)
        return Judgement(perplexity, ppl_delta, z_score, is_spike, is_outlier)

    def state_dict(self) -> dict[str, Any]:
        """The mean and the window."""
        return {"ema": self.ema, "absorbed": self._absorbed, "window": list(self._window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved baseline; a longer window than this one's loses its oldest steps."""
        self.ema, self._absorbed = state_dict["ema"], state_dict["absorbed"]
        self._window = deque(state_dict["window"], maxlen=self._window.maxlen)

    def _delta(self, perplexity: float) -> float:
        return (perplexity - self.ema) / self.ema if self._absorbed else 0.0

    def _z_score(self, log_perplexity: float) -> float:
        if not self._window:
            return 0.0
        median = statistics.median(self._window)
        scale = _SIGMA_PER_MAD * statistics.median(abs(value - median) for value in self._window)
        distance = log_perplexity - median
        if scale == 0.0:  # a window without any spread
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / scale

    def _absorb(self, perplexity: float, log_perplexity: float) -> None:
        self._absorbed += 1
        if self._absorbed == 1:
            self.ema = perplexity
        else:
            self.ema += max(1 / self._absorbed, self.rate) * (perplexity - self.ema)
        self._window.append(log_perplexity)
