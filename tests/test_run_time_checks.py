"""Declared shapes and types are checked in tests."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation
from jaxtyping import Float
from run_time_checks import checked
from torch import Tensor

from theria.attention.operators import Query
from theria.memory.gates import TokenGate
from theria.t_interval import t_half_width

decorate = checked(typechecker=beartype)


def test_theria_is_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="batch length width"):
        TokenGate(4, 2)(torch.zeros(3, 4))
    with pytest.raises(BeartypeCallHintParamViolation):
        TokenGate(4.0, 2)
    with pytest.raises(BeartypeCallHintParamViolation):
        t_half_width(1.0, "3")


def outer(a: Float[Tensor, "rows columns"], b: Float[Tensor, " columns"] | None = None) -> None:
    """Shapes of several arguments."""


def wrong(a: int) -> Float[Tensor, "1 1"]:
    return torch.zeros(a)


def several(a: list[Float[Tensor, " n"]]) -> None:
    """Shapes inside another type."""


def later(a: "Query") -> None:
    """A name in a string."""


def test_shapes_hold_between_arguments_and_inside_other_types() -> None:
    decorate(outer)(torch.zeros(2, 3), torch.zeros(3))
    for function, arguments in (
        (outer, (torch.zeros(2, 3), torch.zeros(2))),
        (wrong, (1,)),
        (several, ([torch.zeros(2, 2)],)),
        (later, (torch.zeros(2),)),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            decorate(function)(*arguments)


def plain(a: int) -> str:
    return "a" * a if a else a


def test_types_without_shapes_are_checked_both_ways() -> None:
    assert decorate(plain)(2) == "aa"
    with pytest.raises(BeartypeCallHintParamViolation):
        decorate(plain)(2.0)
    with pytest.raises(BeartypeCallHintReturnViolation):
        decorate(plain)(0)


def test_inner_functions_are_checked_where_they_declare_shapes() -> None:
    def inner(a: int) -> int:
        return a

    def shaped(a: Float[Tensor, "2"]) -> None:
        """Of two."""

    assert decorate(inner) is inner
    with pytest.raises(jaxtyping.TypeCheckError):
        decorate(shaped)(torch.zeros(3))
