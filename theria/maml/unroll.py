"""The inner loop, and the meta-gradient by automatic differentiation through it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from theria.maml.modes import MetaMode
from theria.maml.refusals import raise_refusals
from theria.maml.task_model import Batch, TaskModel, descend


@dataclass(frozen=True)
class Outcome:
    """Results of one meta-gradient: losses are sums over the tasks, and gradients those of the query loss."""

    query_loss: Float[Tensor, ""]
    query_logits: Float[Tensor, "tasks batch classes"]
    support_loss_before: Float[Tensor, ""]
    adapted_grads: list[Tensor]
    shared_grads: list[Tensor]
    final: list[Tensor]
    inner_lr_grad: Tensor | None = None


@dataclass(frozen=True)
class InnerLoop:
    """Gradient descent of every task on its own support set."""

    task_model: TaskModel
    support: Batch
    query: Batch
    steps: int
    lr: float | Tensor

    def support_gradient(
        self, adapted: Sequence[Tensor], shared: Sequence[Tensor], *, create_graph: bool = False
    ) -> tuple[Float[Tensor, ""], tuple[Tensor, ...]]:
        """Summed support loss, and every task's gradient by its adapted parameters: one call for all."""
        loss, _ = self.task_model.total_loss(adapted, shared, self.support)
        return loss.detach(), torch.autograd.grad(loss, adapted, create_graph=create_graph)

    def constant_step(
        self, adapted: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """Summed support loss before, and parameters after, one step that leaves no graph."""
        leaves = as_leaves(adapted)
        loss, gradients = self.support_gradient(leaves, shared)
        with torch.no_grad():
            return loss, descend(leaves, gradients, self.lr)

    def support_loss(self, adapted: Sequence[Tensor], shared: Sequence[Tensor]) -> Float[Tensor, ""]:
        """Summed support loss, without a graph."""
        with torch.no_grad():
            return self.task_model.total_loss(adapted, shared, self.support)[0]


def as_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values as fresh leaves that require grad."""
    return [t.detach().requires_grad_() for t in tensors]


def unrolled_gradient(
    loop: InnerLoop, adapted: list[Tensor], shared: list[Tensor], *, mode: MetaMode, segment: int
) -> Outcome:
    """The meta-gradient as defined by ``mode``, by reverse mode through the unrolled loop.

    With ``segment`` in 1..K-1 and FULL, the parameters at the starts of segments are kept, and each
    segment's graph is rebuilt when the backward pass reaches it.
    """
    if mode is MetaMode.FULL and 0 < segment < loop.steps:
        return _segmented(loop, adapted, shared, segment)
    theta, common = as_leaves(adapted), as_leaves(shared)
    second_order = mode is MetaMode.FULL
    inner_shared = common if second_order else shared
    phi, before = theta, None
    for step in range(loop.steps):
        if mode is MetaMode.FO_STRICT:
            loss, phi = loop.constant_step(phi, inner_shared)
        else:
            loss, gradients = loop.support_gradient(phi, inner_shared, create_graph=second_order)
            if second_order and step == 0:
                # a layer marked @once_differentiable would leave a first-order gradient without a word
                raise_refusals(gradients, (*theta, *common))
            phi = descend(phi, gradients, loop.lr)
        before = loss if before is None else before
    if mode is MetaMode.FO_STRICT:
        theta = phi = as_leaves(phi)
    query_loss, logits = loop.task_model.total_loss(phi, common, loop.query)
    rate = _learned_rate(loop)
    gradients = torch.autograd.grad(query_loss, (*theta, *common, *(rate if loop.steps else ())))
    return Outcome(
        query_loss=query_loss.detach(),
        query_logits=logits.detach(),
        support_loss_before=loop.support_loss(adapted, shared) if before is None else before,
        adapted_grads=list(gradients[: len(theta)]),
        shared_grads=list(gradients[len(theta) : len(theta) + len(common)]),
        final=[p.detach() for p in phi],
        inner_lr_grad=None if not rate else gradients[-1] if loop.steps else torch.zeros_like(rate[0]),
    )


def _segmented(loop: InnerLoop, adapted: list[Tensor], shared: list[Tensor], segment: int) -> Outcome:
    starts, phi, before = [], adapted, None
    for step in range(loop.steps):
        if step % segment == 0:
            starts.append(phi)
        loss, phi = loop.constant_step(phi, shared)
        before = loss if before is None else before
    assert before is not None  # a segment shorter than the loop means that there were steps
    common, rate = as_leaves(shared), _learned_rate(loop)
    cotangents, shared_grads, query_loss, logits = query_gradient(loop, phi, common)
    rate_grads = [torch.zeros_like(r) for r in rate]
    for index, start in reversed(list(enumerate(starts))):
        theta = as_leaves(start)
        end = theta
        for _ in range(min(segment, loop.steps - index * segment)):
            _, gradients = loop.support_gradient(end, common, create_graph=True)
            if end is theta:
                raise_refusals(gradients, (*theta, *common))
            end = descend(end, gradients, loop.lr)
        pulled = torch.autograd.grad(end, (*theta, *common, *rate), cotangents)
        cotangents = list(pulled[: len(theta)])
        for total, part in zip((*shared_grads, *rate_grads), pulled[len(theta) :], strict=True):
            total += part
    return Outcome(query_loss, logits, before, cotangents, shared_grads, phi, rate_grads[0] if rate else None)


def query_gradient(
    loop: InnerLoop, adapted: Sequence[Tensor], shared: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """First-order gradient of the summed query loss by both parameter sets, the loss and the logits."""
    leaves, common = as_leaves(adapted), as_leaves(shared)
    loss, logits = loop.task_model.total_loss(leaves, common, loop.query)
    gradients = torch.autograd.grad(loss, (*leaves, *common))
    return list(gradients[: len(leaves)]), list(gradients[len(leaves) :]), loss.detach(), logits.detach()


def _learned_rate(loop: InnerLoop) -> list[Tensor]:
    return [loop.lr] if isinstance(loop.lr, Tensor) and loop.lr.requires_grad else []
