"""What adaptation does, step by step, with no outer graph."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theria.maml.task_model import Batch, TaskModel, accuracy, check_batch, cross_entropy
from theria.maml.unroll import InnerLoop


@dataclass(frozen=True)
class AdaptationCurve:
    """Per-task measurements after 0, 1, ..., K inner steps; losses in nats, accuracies in [0, 1]."""

    support_loss: Float[Tensor, "steps tasks"]
    query_loss: Float[Tensor, "steps tasks"]
    query_accuracy: Float[Tensor, "steps tasks"]


def adaptation_curve(
    model: nn.Module,
    support: Batch,
    query: Batch,
    *,
    inner_steps: int,
    inner_lr: float,
    adapt: Sequence[str] | None = None,
) -> AdaptationCurve:
    """Adapt every task on its support set and measure both sets after each inner step.

    The inner gradients are first order, so nothing of the loop outlives the call.

    Args:
        model: maps x (batch, length, width) to logits (batch, classes).
        support: x (tasks, batch, length, width), y (tasks, batch).
        query: likewise.
        inner_steps: K >= 0; the curve has K + 1 rows.
        inner_lr: rate of the inner gradient descent.
        adapt: names of modules or parameters the inner loop adapts; None adapts all that are trained.

    Raises:
        ValueError: shapes that do not fit or a negative ``inner_steps``.
    """
    check_batch("support", support)
    check_batch("query", query)
    if inner_steps < 0:
        raise ValueError(f"inner_steps must be at least 0, got {inner_steps}")
    task_model = TaskModel(model, adapt)
    loop = InnerLoop(task_model, support, query, inner_steps, inner_lr)
    adapted, shared = task_model.initial(support[1].shape[0])
    support_losses, query_losses, accuracies = [], [], []
    for step in range(inner_steps + 1):
        with torch.no_grad():
            support_losses.append(cross_entropy(task_model.logits(adapted, shared, support[0]), support[1]))
            logits = task_model.logits(adapted, shared, query[0])
            query_losses.append(cross_entropy(logits, query[1]))
            accuracies.append(accuracy(logits, query[1]))
        if step < inner_steps:
            with torch.enable_grad():
                _, adapted = loop.constant_step(adapted, shared)
    return AdaptationCurve(torch.stack(support_losses), torch.stack(query_losses), torch.stack(accuracies))
