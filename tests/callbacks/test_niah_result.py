"""What a probe's figures are called, and which of them are spoken of."""

import pytest

from callbacks.niah_result import NIAHResult
from theria.memory.needle import Mean, NeedleRecall
from theria.models.needle_prompts import PromptRecall, Share


def result(*, worst=0.9, leaks=False, right=90, controls=1, prompts=True, further=None) -> NIAHResult:
    memory = NeedleRecall(100, Mean(0.91, 0.9, 0.92), worst, 0.88, Mean(0.01, -0.02, 0.04), leaks)
    asked = PromptRecall(
        {64: (Share(right // 2, 50), Share(right - right // 2, 50))} | (further or {}),
        {"never_stored": Share(controls, 64)},
        1 / 64,
    )
    return NIAHResult(7, memory, (memory,), asked if prompts else None, 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"prompts": False}, []),
        ({"worst": 0.79}, ["0.790 in the worst head"]),
        ({"leaks": True}, ["a key never stored reads 0.010 [-0.020, 0.040], expected 0"]),
        ({"right": 79}, ["answered 0.790 [0.700, 0.858]"]),
        ({"controls": 20}, ["never_stored 0.312"]),
        ({"worst": 0.1, "right": 3}, ["0.100 in the worst head", "answered 0.030"]),
    ],
)
def test_a_level_that_falls_short_is_spoken_of_and_no_other(changes, said):
    told = list(result(**changes).failures(0.8))
    assert len(told) == len(said)
    for message, part in zip(told, said, strict=True):
        assert part in message


def test_records_and_loggers_have_the_same_figures():
    found = result()
    assert found.fields() == {"niah_cosine": 0.91, "niah_accuracy": 0.9}
    scalars = found.scalars()
    assert scalars["niah/cosine"] == scalars["niah/cosine_at_100"] == 0.91
    assert scalars["niah/accuracy"] == 0.9
    assert (scalars["niah/accuracy_low"], scalars["niah/accuracy_high"]) == Share(90, 100).interval()
    assert result(prompts=False).fields() == {"niah_cosine": 0.91}
    assert not [name for name in result(prompts=False).scalars() if "accuracy" in name or "chance" in name]


def test_accuracy_by_depth_is_over_all_lengths():
    scalars = result(further={128: (Share(2, 10), Share(0, 0))}).scalars()
    assert scalars["niah/accuracy_depth_1"] == (45 + 2) / (50 + 10)
    assert scalars["niah/accuracy_depth_2"] == 45 / 50
    assert "niah/accuracy_depth_3" not in scalars
