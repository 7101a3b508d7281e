"""Evaluation mode for a while, every module's own mode behind it."""

import pytest
from torch import nn

from callbacks.evaluation_mode import evaluation_mode


def test_modes_are_put_back_where_the_measurement_fails() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()

    def fail() -> None:
        with evaluation_mode(model):
            assert not any(part.training for part in model.modules())
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert [part.training for part in model.modules()] == [True, True, False]
