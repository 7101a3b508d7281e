"""The rules of a rollback on series of losses: what is usual, what is a fault, and where to go back to."""

import math
import random
import statistics

import pytest

from callbacks.perplexity_baseline import PerplexityBaseline
from callbacks.rollback_ring import RollbackRing
from callbacks.training_health import TrainingHealth, Trigger


def noisy(steps: int, seed: int, noise: float = 0.05) -> list[float]:
    """Losses of a training that is all right: they fall, and vary from batch to batch."""
    generator = random.Random(seed)
    return [2 + 3 * math.exp(-step / 150) + generator.gauss(0, noise) for step in range(steps)]


def health(trigger: Trigger = "robust", patience: int = 2) -> TrainingHealth:
    return TrainingHealth(PerplexityBaseline(), trigger, patience, z_alone=math.inf)


def faults(judge: TrainingHealth, losses: list[float]) -> list[int]:
    """The steps at which a fault is found, each forgotten at once."""
    found = []
    for step, loss in enumerate(losses, 1):
        judge.observe(step, step, loss, 1.0)
        if judge.fault is not None:
            found.append(step)
            judge.start_again(0)
    return found


def test_the_baseline_is_what_a_naive_loop_gives() -> None:
    losses, baseline = noisy(300, seed=1), PerplexityBaseline(steps=50, warm_up=400)
    ema = 0.0
    for t, loss in enumerate(losses, 1):
        perplexity, window = math.exp(loss), losses[max(0, t - 51) : t - 1]
        judged = baseline.judge(loss)
        assert judged.perplexity == perplexity
        if t > 1:
            assert judged.ppl_delta == pytest.approx((perplexity - ema) / ema)
            assert judged.is_spike == ((perplexity - ema) / ema > 0.05)
        if t > 3:
            median = statistics.median(window)
            deviation = statistics.median([abs(value - median) for value in window])
            assert judged.z_score == pytest.approx((loss - median) / (1.4826 * deviation))
        ema += max(1 / t, 2 / 51) * (perplexity - ema)
    assert not judged.is_outlier


def test_the_scale_is_the_standard_deviation_of_normal_noise() -> None:
    generator, baseline = random.Random(0), PerplexityBaseline(steps=5000)
    for _ in range(5000):
        baseline.judge(generator.gauss(3.0, 0.2))
    assert baseline.judge(4.0).z_score == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize(
    ("rise", "trigger", "found"), [(0.8, "robust", []), (12.0, "robust", [251]), (12.0, "plain", [])]
)
def test_one_step_far_off_is_a_fault_by_itself(rise: float, trigger: Trigger, found: list[int]) -> None:
    losses = noisy(300, seed=2)
    losses[250] += rise
    threshold = 10.0 if trigger == "plain" else 0.05  # noise alone is above the usual one
    judge = TrainingHealth(PerplexityBaseline(threshold=threshold), trigger, patience=2)
    assert faults(judge, losses) == found
    assert faults(health(), losses) == []


def test_perplexity_is_bounded_and_not_finite_where_the_loss_is_not() -> None:
    assert PerplexityBaseline().judge(1000.0).perplexity == math.exp(20)
    for loss in (math.nan, math.inf, -math.inf):
        baseline = PerplexityBaseline()
        baseline.judge(1.0)
        before = baseline.state_dict()
        assert baseline.judge(loss).is_outlier
        assert baseline.state_dict() == before


def test_outliers_do_not_move_the_baseline() -> None:
    baseline = PerplexityBaseline()
    for loss in noisy(400, seed=2):
        baseline.judge(loss)
    before = baseline.ema
    for _ in range(20):
        assert baseline.judge(math.log(10 * before)).is_outlier
    assert baseline.ema == pytest.approx(before, rel=0.01)
    assert baseline.ema == before


def test_the_baseline_follows_a_slow_rise_and_a_sudden_fall() -> None:
    """By stairs of 1%, whose noise is so small that each is far outside of it."""
    for change in (lambda step: 0.01 * (step // 100), lambda step: -1.0 if step > 300 else 0.0):
        judge = health()
        assert faults(judge, [2.0 + 1e-4 * math.sin(step) + change(step) for step in range(1000)]) == []
        assert abs(judge.baseline.judge(2.0 + change(999)).ppl_delta) < 0.05


@pytest.mark.parametrize("trigger", ["robust", "plain"])
def test_nothing_but_what_is_not_finite_is_bad_while_it_warms_up(trigger: Trigger) -> None:
    for steps, bad in ((49, False), (50, True)):
        judge = TrainingHealth(PerplexityBaseline(warm_up=50), trigger, patience=1)
        for step, loss in enumerate([1.0, 1.01] * 30, 1):
            if step <= steps:
                judge.observe(step, step, loss, 1.0)
        judged, good = judge.observe(steps + 1, 0, 9.0, 1.0)
        assert judged.is_spike
        assert good is not bad
        assert (judge.fault is not None) is bad


def test_a_window_without_spread_still_tells_a_rise() -> None:
    baseline = PerplexityBaseline()
    for _ in range(100):
        assert baseline.judge(1.0).z_score == 0.0
    assert baseline.judge(1.2).is_outlier


@pytest.mark.parametrize("seed", range(5))
def test_batch_noise_is_no_fault_by_default_and_many_by_the_plain_rule(seed: int) -> None:
    """At .05 nats of noise a sixth of the steps is 5% above their mean."""
    assert faults(health(), noisy(1000, seed)) == []
    generator = random.Random(seed)
    flat = [2 + generator.gauss(0, 0.05) for _ in range(1000)]
    assert faults(health(), flat) == []
    assert 100 < len(faults(health("plain", patience=1), flat)) < 200


@pytest.mark.parametrize(("rise", "at"), [(3.0, 150), (0.6, 500), (3.0, 500), (30.0, 500), (0.6, 990)])
def test_a_rise_is_a_fault_on_its_second_step(rise: float, at: int) -> None:
    losses = noisy(1000, seed=3)
    risen = losses[:at] + [loss + rise for loss in losses[at : at + 5]]
    assert faults(health(), risen)[0] == at + 2
    assert faults(health(patience=4), risen)[0] == at + 4
    alone = [*losses[:at], losses[at] + rise, *losses[at + 1 :]]
    assert faults(health(), alone) == []


def test_a_fault_tells_its_first_and_last_batch() -> None:
    judge = health()
    for step, loss in enumerate(noisy(200, seed=4), 1):
        judge.observe(step, 3 * step, loss, 1.0)
    judge.observe(201, 700, 9.0, 1.0)
    judge.observe(202, 703, 9.0, 1.0)
    assert judge.fault is not None
    assert judge.fault[1:] == (201, 202, 700, 703)
    reason = judge.fault.reason
    judge.observe(203, 706, 9.5, 1.0)  # known only when this one was under way
    assert judge.fault[:] == (reason, 201, 203, 700, 706)


@pytest.mark.parametrize(
    ("loss", "gradient"), [(math.nan, 1.0), (2.0, math.inf), (2.0, math.nan), (-math.inf, 0)]
)
def test_what_is_not_finite_is_a_fault_at_once(loss: float, gradient: float) -> None:
    judge = health(patience=5)
    judge.start_again(cool_until=100)
    judge.observe(1, 0, loss, gradient)
    assert judge.fault is not None
    assert "loss" in judge.fault.reason if not math.isfinite(loss) else "gradient" in judge.fault.reason


def test_a_saved_judge_goes_on_as_the_other() -> None:
    losses = [*noisy(300, seed=5), 9.0, 9.1, 9.2]
    one = health(patience=3)
    for step, loss in enumerate(losses, 1):
        other = health(patience=3)
        other.load_state_dict(one.state_dict())
        assert one.observe(step, step, loss, 1.0) == other.observe(step, step, loss, 1.0)
        assert one.state_dict() == other.state_dict()
    assert one.fault == other.fault is not None


def test_a_checkpoint_is_a_target_after_good_steps_running() -> None:
    ring = RollbackRing(size=3, healthy_after=4)
    ring.add(0, trusted=True)
    ring.add(10)
    for step in range(1, 14):
        ring.observe(step, good=True)
        assert ring.target == 0
    ring.observe(14, good=False)
    for step in range(15, 18):
        ring.observe(step, good=True)
        assert ring.target == 0
    ring.observe(18, good=True)
    assert ring.target == 10
    ring.observe(19, good=False)
    assert ring.target == 10


def test_the_ring_keeps_its_size_and_its_target() -> None:
    ring = RollbackRing(size=2, healthy_after=4)
    assert ring.add(0, trusted=True) == []
    assert ring.add(5) == []
    assert ring.add(6) == []  # 0 is beyond the size, and the only one to go back to
    assert ring.steps == [0, 5, 6]
    for step in range(6, 10):
        ring.observe(step, good=True)
    assert ring.target == 5
    assert ring.add(20) == [0, 5] or ring.steps == [5, 6, 20]
    saved = RollbackRing(size=2, healthy_after=4)
    saved.load_state_dict(ring.state_dict())
    assert (saved.steps, saved.target) == (ring.steps, ring.target)
    assert ring.drop_after(5) == [6, 20]
    assert (ring.steps, ring.target) == ([5], 5)
    saved.keep_only([6, 99])
    assert saved.steps == [6]
