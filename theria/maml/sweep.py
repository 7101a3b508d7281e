"""The meta-gradient without differentiating any gradient in reverse: a backward sweep over the trajectory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from theria.maml.task_model import descend
from theria.maml.unroll import InnerLoop, Outcome, query_gradient


def swept_gradient(
    loop: InnerLoop, adapted: list[Tensor], shared: list[Tensor], *, second_order: bool
) -> Outcome:
    r"""Mixed-mode meta-gradient (arXiv 2505.00793).

    .. math::
        u_K = \nabla L_{query}(\theta_K), \qquad u_k = u_{k+1} - \alpha H(\theta_k) u_{k+1}

    with H the Hessian of the support losses. Parameters that are not adapted collect the mixed term,
    :math:`-\alpha \sum_k \partial_\psi \partial_\theta L \, u_{k+1}`. First order is the sweep without H.
    Second order keeps theta_0 .. theta_K and nothing else; H u is one forward-over-reverse product.
    """
    trajectory: list[list[Tensor]] = []
    theta, before = adapted, None
    for _ in range(loop.steps):
        if second_order:
            trajectory.append(theta)
        loss, theta = loop.constant_step(theta, shared)
        before = loss if before is None else before
    if before is None:
        before = loop.support_loss(adapted, shared)
    u, shared_grads, query_loss, logits = query_gradient(loop, theta, shared)
    for point in reversed(trajectory):
        curved, mixed = hessian_vector_product(loop, point, shared, u)
        u = descend(u, curved, loop.lr)
        shared_grads = descend(shared_grads, mixed, loop.lr)
    return Outcome(query_loss, logits, before, u, shared_grads, theta)


def hessian_vector_product(
    loop: InnerLoop, adapted: Sequence[Tensor], shared: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Forward over reverse: (d2L/dtheta2) u and (d2L/dpsi dtheta) u for the sum L of the support losses.

    The gradient is taken of dual tensors, so its tangent is the product. A graph that is cut between
    loss and parameters raises here, where ``torch.func.grad`` would answer zero.
    """
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(p.detach().requires_grad_(), t)
            for p, t in zip(adapted, tangents, strict=True)
        ]
        common = [p.detach().requires_grad_() for p in shared]
        loss, _ = loop.task_model.total_loss(duals, common, loop.support)
        gradients = torch.autograd.grad(loss, (*duals, *common))
        products = [_tangent(g) for g in gradients]
    return products[: len(duals)], products[len(duals) :]


def _tangent(gradient: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(gradient).tangent
    return torch.zeros_like(gradient) if tangent is None else tangent
