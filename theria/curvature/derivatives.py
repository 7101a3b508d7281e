"""Every first and second derivative of one attention call, by every way autograd has to take it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad

from theria.curvature.cases import Sample
from theria.curvature.convention import Attention
from theria.curvature.verdicts import Status, one_line, status_of

INPUTS = ("query", "key", "value")
OUTPUTS = (*INPUTS, "cotangent")
"""What a Hessian-vector product has cotangents of: the inputs, and the output's own cotangent."""

FORWARD = "forward"
VJP, VJP_GRAPH, HVP = "vjp", "vjp with graph", "hvp"
JVP, FORWARD_OVER_REVERSE = "jvp", "forward over reverse"


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
        values: quantity -> its values in float64. A quantity is named by the way it was taken and by the
            input it belongs to: "vjp/query"; and by the direction's input, "hvp along key/query". An output
            of the wrong shape is NaN.
        failure: the first error on the way to the second derivative in reverse mode, which the probe does
            not go beyond.
        unsupported: forward modes that raise -> the error. Raising there is an absence, not a fault.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    failure: Failure | None = None
    unsupported: dict[str, str] = field(default_factory=dict)

    def keep(self, way: str, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Add quantities."""
        for name, tensor in zip(names, tensors, strict=True):
            self.values[f"{way}/{name}"] = tensor.detach().double()


def evaluate(attention: Attention, sample: Sample, *, causal: bool) -> Outcome:
    """Call an implementation and differentiate it, stopping at the first order that raises.

    The forward; the vjp, without a graph and with ``create_graph``; the Hessian-vector product in reverse
    over reverse mode along the sample's direction and along its part in each input alone; the jvp along each
    input; the Hessian-vector product in forward over reverse mode. Each way calls the implementation anew.

    What is differentiated twice is <g(x), u> + 0 x: the inner step x - lr g(x) of meta-learning always keeps
    an edge to x, so gradients that come back without a graph are zero curvature there, not an error.
    """
    outcome = Outcome()
    steps = (_forward, _vjp, _hvp_along_all, _hvp_along_each)
    for order, step in zip((0, 1, 2, 2), steps, strict=True):
        try:
            step(attention, sample, causal, outcome)
        except Exception as error:  # the implementation is someone else's and may raise anything
            outcome.failure = Failure.of(error, order)
            return outcome
    for way, probe in ((JVP, _jvp), (FORWARD_OVER_REVERSE, _forward_over_reverse)):
        try:
            probe(attention, sample, causal, outcome)
        except Exception as error:
            outcome.unsupported[way] = one_line(error)
    return outcome


def _leaves(sample: Sample) -> tuple[Tensor, ...]:
    """query, key, value and cotangent as fresh leaves, in their own strides."""
    return tuple(t.detach().requires_grad_() for t in (*sample.inputs, sample.cotangent))


def _called(attention: Attention, inputs: Sequence[Tensor], causal: bool) -> Tensor:
    query, key, value = inputs
    return attention(query, key, value, is_causal=causal)


def _forward(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    *inputs, cotangent = _leaves(sample)
    out = _called(attention, inputs, causal)
    if out.shape != cotangent.shape:
        outcome.keep(FORWARD, ("out",), (torch.full_like(cotangent, torch.nan),))
        raise ValueError(f"the output has shape {tuple(out.shape)} instead of {tuple(cotangent.shape)}")
    outcome.keep(FORWARD, ("out",), (out,))


def _vjp(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    *inputs, _ = _leaves(sample)
    out = _called(attention, inputs, causal)
    gradients = torch.autograd.grad(out, inputs, sample.cotangent.to(out.dtype), allow_unused=False)
    outcome.keep(VJP, INPUTS, gradients)


def _inner_products(
    attention: Attention, sample: Sample, causal: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Callable[[int], Tensor]]:
    """Leaves, gradients with their graph, and <gradient, direction> of one input."""
    leaves = _leaves(sample)
    out = _called(attention, leaves[:3], causal)
    gradients = torch.autograd.grad(
        out, leaves[:3], leaves[3].to(out.dtype), create_graph=True, allow_unused=False
    )
    return leaves, gradients, lambda i: (gradients[i] * sample.directions[i]).sum()


def differentiate_again(
    scalar: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of ``scalar + 0 sum(leaves)`` by the leaves, raising whatever ``backward()`` would raise.

    ``torch.autograd.grad`` does not enter the parts of a graph that lead to none of its inputs. The node with
    which ``@once_differentiable`` refuses a second derivative leads to none: asked for the gradient by given
    inputs, autograd goes past it and returns zeros. So every leaf that the graph reaches is asked for here.
    """
    total = scalar + torch.stack([0 * leaf.sum() for leaf in leaves]).sum()
    own = {id(leaf) for leaf in leaves}
    others = [leaf for leaf in _reached(total) if id(leaf) not in own]
    gradients = torch.autograd.grad(total, (*leaves, *others), retain_graph=retain_graph, allow_unused=False)
    return gradients[: len(leaves)]


def _reached(tensor: Tensor) -> list[Tensor]:
    """Every leaf of the graph that ends in a tensor."""
    found, seen, waiting = [], set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return found


def _hvp_along_all(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    leaves, gradients, product = _inner_products(attention, sample, causal)
    outcome.keep(VJP_GRAPH, INPUTS, gradients)
    total = product(0) + product(1) + product(2)
    outcome.keep(HVP, OUTPUTS, differentiate_again(total, leaves))


def _hvp_along_each(attention: Attention, sample: Sample, causal: bool, outcome: Outcome) -> None:
    leaves, _, product = _inner_products(attention, sample, causal)
    for i, name in enumerate(INPUTS):
        curved = differentiate_again(product(i), leaves, retain_graph=True)
        outcome.keep(f"{HVP} along {name}", OUTPUTS, curved)


def _duals(sample: Sample, moved: Sequence[int], *, differentiable: bool) -> Iterator[Tensor]:
    for i, (primal, direction) in enumerate(zip(sample.inputs, sample.directions, strict=True)):
        leaf = primal.detach().requires_grad_(differentiable)
        yield forward_ad.make_dual(leaf, direction) if i in moved else leaf


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
        gradients = torch.autograd.grad(out, inputs, sample.cotangent.to(out.dtype), allow_unused=False)
        outcome.keep(FORWARD_OVER_REVERSE, INPUTS, [_tangent(g) for g in gradients])
