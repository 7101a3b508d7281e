"""Second derivatives that a graph refuses, and that ``torch.autograd.grad`` passes by without a word."""

from collections.abc import Sequence

import torch
from torch import Tensor


def raise_refusals(tensors: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Raise what ``backward()`` from these tensors would raise on the way to leaves nobody asks for.

    ``torch.autograd.grad`` does not enter the parts of a graph that lead to none of its inputs. The node
    with which ``@once_differentiable`` refuses a second derivative leads to none: it ends in leaves of its
    own. Asked for the gradient by given inputs, autograd goes past it and returns zeros. So the leaves that
    are not known are asked for here, with cotangents of zero. Where there are none, as in a sound graph,
    nothing is differentiated.

    Args:
        tensors: gradients with a graph.
        known: leaves that the caller differentiates by anyway.

    Raises:
        RuntimeError: what the graph answers.
    """
    own = {id(leaf) for leaf in known}
    hidden = [leaf for leaf in _leaves(tensors) if id(leaf) not in own]
    if hidden:
        rooted = [t for t in tensors if t.requires_grad]
        zeros = [torch.zeros_like(t) for t in rooted]
        torch.autograd.grad(rooted, hidden, zeros, retain_graph=True, allow_unused=True)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every leaf of the graphs that end in these tensors."""
    found, seen, waiting = [], set(), [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return found
