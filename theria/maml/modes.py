"""The three meta-gradient regimes and the two ways to compute them."""

from enum import StrEnum
from typing import TypeVar


class MetaMode(StrEnum):
    """What the outer gradient may see of the inner loop.

    Attributes:
        FULL: second-order MAML: the inner gradients are differentiated (Finn et al. 2017, eq. 1).
        FO: first-order MAML: the inner gradients are constants, the graph of the parameters stays.
        FO_STRICT: FO, and the adapted parameters are cut from the initial ones; the query gradient at the
            adapted parameters is applied to the initial ones. In exact arithmetic the same as FO.
    """

    FULL = "FULL"
    FO = "FO"
    FO_STRICT = "FO_STRICT"


class Strategy(StrEnum):
    """How a meta-gradient is computed; both give the same numbers within rounding.

    Attributes:
        UNROLLED: automatic differentiation through the unrolled inner loop: the definition.
        SWEEP: the parameters' trajectory is kept and walked backwards with one forward-over-reverse
            Hessian-vector product a step.
    """

    UNROLLED = "unrolled"
    SWEEP = "sweep"


Choice = TypeVar("Choice", bound=StrEnum)


def parse_choice(kind: type[Choice], value: str) -> Choice:
    """The member of ``kind`` that ``value`` names.

    Raises:
        ValueError: naming the value and the members there are.
    """
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise ValueError(f"{kind.__name__} {value!r} is not one of {known}") from None
