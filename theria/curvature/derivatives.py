"""Every first and second derivative of one attention call, by every way autograd has to take it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from theria.curvature.cases import Sample
from theria.curvature.convention import Attention
from theria.curvature.verdicts import Status, one_line, status_of
from theria.maml.refusals import raise_refusals

INPUTS = ("query", "key", "value")
OUTPUTS = (*INPUTS, "cotangent")
"""What a Hessian-vector product has cotangents of: the inputs, and the output's own cotangent."""

FORWARD, JVP, FORWARD_OVER_REVERSE = "forward", "jvp", "forward over reverse"
VJP, VJP_ALONE = "vjp", "vjp of one input alone"
VJP_GRAPH, VJP_CONSTANT = "vjp with a graph", "vjp with a graph at a constant cotangent"
HVP, HVP_CONSTANT, HVP_ALONE = "hvp", "hvp at a constant cotangent", "hvp of one input alone"

KINDS = {
    "forward": (FORWARD,),
    "vjp": (VJP, VJP_GRAPH, VJP_CONSTANT, VJP_ALONE),
    "jvp": (JVP,),
    "hvp": (HVP, HVP_CONSTANT, HVP_ALONE),
    "forward_over_reverse": (FORWARD_OVER_REVERSE,),
}
"""Kind of quantity -> the ways in which it is taken."""

_KIND_OF = {way: kind for kind, ways in KINDS.items() for way in ways}
_ORDERS = {"forward": 0, "vjp": 1, "jvp": 1, "hvp": 2, "forward_over_reverse": 2}


class Quantity(NamedTuple):
    """One tensor of a probe: how it was taken, what it belongs to, and the input that the direction is in."""

    way: str
    of: str
    along: str = ""

    @property
    def kind(self) -> str:
        """The key of `KINDS`."""
        return _KIND_OF[self.way]

    @property
    def order(self) -> int:
        """How often the output is differentiated."""
        return _ORDERS[self.kind]

    def __str__(self) -> str:
        return f"{self.way}, {self.of}" + (f" along {self.along}" if self.along else "")


@dataclass(frozen=True)
class Failure:
    """A derivative that raised: of which order (0 is the call itself), what that means, and the text."""

    order: int
    status: Status
    error: str

    @classmethod
    def of(cls, error: Exception, order: int) -> "Failure":
        """The failure that an exception reports."""
        return cls(order, status_of(error, order), one_line(error))


@dataclass
class Outcome:
    """What an implementation answered in one case.

    Attributes:
        values: every quantity in float64. The output of a call that broke the rules (wrong shape or dtype,
            inputs changed) is NaN.
        failure: the first error on the way to the second derivative in reverse mode, beyond which the probe
            does not go.
        unsupported: forward modes that raise -> the error. Raising there is an absence, not a fault.
    """

    values: dict[Quantity, Tensor] = field(default_factory=dict)
    failure: Failure | None = None
    unsupported: dict[str, str] = field(default_factory=dict)

    def keep(self, way: str, names: Sequence[str], tensors: Sequence[Tensor], along: str = "") -> None:
        """Add quantities."""
        for name, tensor in zip(names, tensors, strict=True):
            self.values[Quantity(way, name, along)] = tensor.detach().double()


def evaluate(attention: Attention, sample: Sample, *, causal: bool) -> Outcome:
    """Call an implementation and differentiate it, stopping at the first order that raises.

    Taken are the forward; the vjp, without and with ``create_graph``; Hessian-vector products in reverse over
    reverse mode along the sample's direction in each input, with the output's cotangent as a fourth variable
    and as a constant; both again with one input requiring grad alone; the jvp along each input; and the
    Hessian-vector product in forward over reverse mode. Each way calls the implementation anew.
    """
    outcome = Outcome()
    for order, step in ((0, _forward), (1, _first), (2, _second), (2, _alone)):
        try:
            step(attention, sample, causal, outcome)
        except Exception as error:  # the implementation is someone else's and may raise anything
            outcome.failure = Failure.of(error, order)
            return outcome
    for way, probe in ((JVP, _jvp), (FORWARD_OVER_REVERSE, _forward_over_reverse)):
        try:
            probe(attention, sample, causal, outcome)
        except Exception as error:  # likewise
            outcome.unsupported[way] = one_line(error)
    return outcome


def differentiate_again(
    scalar: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of ``scalar + 0 sum(leaves)`` by the leaves, raising whatever ``backward()`` would raise.

    The added edges are those of meta-learning: an inner step x - lr g(x) depends on x whatever g does, so a
    gradient that comes back without a graph is zero curvature there, not an error. What the graph refuses is
    one, see `raise_refusals`.
    """
    raise_refusals((scalar,), leaves)
    total = scalar + torch.stack([0 * leaf.sum() for leaf in leaves]).sum()
    return torch.autograd.grad(total, tuple(leaves), retain_graph=retain_graph, allow_unused=False)


def _copies(sample: Sample, differentiable: Sequence[int] = (0, 1, 2)) -> list[Tensor]:
    """query, key and value in memory of their own, laid out as theirs, some of them requiring grad."""
    return [t.detach().clone().requires_grad_(i in differentiable) for i, t in enumerate(sample.inputs)]


def _called(attention: Attention, inputs: Sequence[Tensor], causal: bool) -> Tensor:
    query, key, value = inputs
    return attention(query, key, value, is_causal=causal)


def _forward(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    inputs = _copies(sample)
    out = _called(attention, inputs, causal)
    shape = sample.cotangent.shape
    changed = [n for n, x, y in zip(INPUTS, inputs, sample.inputs, strict=True) if not torch.equal(x, y)]
    if out.shape == shape and out.dtype is sample.query.dtype and not changed:
        outcome.keep(FORWARD, ("out",), (out,))
        return
    outcome.keep(FORWARD, ("out",), (torch.full_like(sample.cotangent, torch.nan),))
    if changed:
        raise ValueError(f"the call writes into its input {', '.join(changed)}")
    if out.shape != shape:
        raise ValueError(f"the output has shape {tuple(out.shape)} instead of {tuple(shape)}")
    raise ValueError(f"the output is of {out.dtype} instead of {sample.query.dtype}")


def _first(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    inputs = _copies(sample)
    out = _called(attention, inputs, causal)
    gradients = torch.autograd.grad(out, inputs, sample.cotangent, allow_unused=False)
    outcome.keep(VJP, INPUTS, gradients)


def _second(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    for way, first in ((HVP, VJP_GRAPH), (HVP_CONSTANT, VJP_CONSTANT)):
        inputs = _copies(sample)
        cotangent = sample.cotangent.detach().requires_grad_(way == HVP)
        out = _called(attention, inputs, causal)
        gradients = torch.autograd.grad(out, inputs, cotangent, create_graph=True, allow_unused=False)
        outcome.keep(first, INPUTS, gradients)
        variables, names = ((*inputs, cotangent), OUTPUTS) if way == HVP else (tuple(inputs), INPUTS)
        for name, gradient, direction in zip(INPUTS, gradients, sample.directions, strict=True):
            curved = differentiate_again((gradient * direction).sum(), variables, retain_graph=True)
            outcome.keep(way, names, curved, along=name)


def _alone(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    for i, name in enumerate(INPUTS):
        inputs = _copies(sample, differentiable=(i,))
        out = _called(attention, inputs, causal)
        (gradient,) = torch.autograd.grad(
            out, inputs[i], sample.cotangent, create_graph=True, allow_unused=False
        )
        outcome.keep(VJP_ALONE, (name,), (gradient,))
        curved = differentiate_again((gradient * sample.directions[i]).sum(), (inputs[i],))
        outcome.keep(HVP_ALONE, (name,), curved, along=name)


def _duals(sample: Sample, moved: Sequence[int], *, differentiable: bool) -> Iterator[Tensor]:
    copies = _copies(sample, differentiable=(0, 1, 2) if differentiable else ())
    for i, (primal, direction) in enumerate(zip(copies, sample.directions, strict=True)):
        yield forward_ad.make_dual(primal, direction) if i in moved else primal


def _tangent(tensor: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(tensor).tangent
    return torch.zeros_like(tensor) if tangent is None else tangent


def _jvp(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    found = []
    for i in range(len(INPUTS)):
        with forward_ad.dual_level():
            inputs = tuple(_duals(sample, (i,), differentiable=False))
            found.append(_tangent(_called(attention, inputs, causal)))
    outcome.keep(JVP, INPUTS, found)


def _forward_over_reverse(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    with forward_ad.dual_level():
        inputs = tuple(_duals(sample, (0, 1, 2), differentiable=True))
        out = _called(attention, inputs, causal)
        gradients = torch.autograd.grad(out, inputs, sample.cotangent, allow_unused=False)
        outcome.keep(FORWARD_OVER_REVERSE, INPUTS, [_tangent(g) for g in gradients])
