"""The meta-gradient of a batch of tasks: one public function, two strategies, three modes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theria.maml.modes import MetaMode, Strategy, parse_choice
from theria.maml.sweep import swept_gradient
from theria.maml.task_model import Batch, TaskModel, accuracy, check_batch
from theria.maml.unroll import InnerLoop, unrolled_gradient


@dataclass(frozen=True)
class MetaGradient:
    """What one meta-batch says about the initial parameters; all values are means over the tasks.

    Attributes:
        loss: query cross-entropy after adaptation, in nats.
        grads: parameter name -> gradient of ``loss``, of the parameter's shape.
        query_accuracy: share of query sequences classified rightly after adaptation.
        support_loss_before: support cross-entropy at the initial parameters, in nats.
        support_loss_after: the same after adaptation; None unless diagnostics were asked for.
        query_accuracy_before: query accuracy at the initial parameters; None likewise.
        inner_lr_grad: gradient of ``loss`` for a learned inner rate; None for a fixed one.
    """

    loss: Float[Tensor, ""]
    grads: dict[str, Tensor]
    query_accuracy: Float[Tensor, ""]
    support_loss_before: Float[Tensor, ""]
    support_loss_after: Float[Tensor, ""] | None = None
    query_accuracy_before: Float[Tensor, ""] | None = None
    inner_lr_grad: Tensor | None = None


def meta_gradient(
    model: nn.Module,
    support: Batch,
    query: Batch,
    *,
    mode: MetaMode | str,
    inner_steps: int,
    inner_lr: float | Tensor,
    strategy: Strategy | str = Strategy.UNROLLED,
    inner_checkpoint: int = 0,
    adapt: Sequence[str] | None = None,
    diagnostics: bool = False,
) -> MetaGradient:
    r"""Gradient of the adapted query loss with respect to the initial parameters.

    .. math::
        \theta_{k+1} = \theta_k - \alpha \nabla L_{support}(\theta_k), \qquad
        g = \tfrac{1}{T} \sum_{tasks} \frac{d}{d\theta_0} L_{query}(\theta_K)

    Tasks are a tensor dimension: parameters are stacked per task, the forward is vmapped and one autograd
    call on the sum of the support losses yields every task's inner gradient. The model's parameters and
    their ``.grad`` are not touched.

    Args:
        model: maps x (batch, length, width) to logits (batch, classes).
        support: x (tasks, batch, length, width) and integer y (tasks, batch) the inner loop descends on.
        query: likewise, what the outer loss is measured on.
        mode: FULL, FO or FO_STRICT, see `MetaMode`.
        inner_steps: K >= 0.
        inner_lr: alpha; a tensor with ``requires_grad`` is a learned rate (``unrolled`` FULL and FO only).
        strategy: ``unrolled`` or ``sweep``, see `Strategy`. Memory of ``sweep`` is
            tasks x parameters x (K + 1); that of ``unrolled`` holds the graph of all K steps.
        inner_checkpoint: with ``unrolled`` FULL, recompute the graph in segments of this many inner steps,
            so that memory holds K / c sets of parameters and the graph of c steps; c near sqrt(K) is the
            least. 0 keeps the whole graph.
        adapt: names of modules or parameters the inner loop adapts; None adapts all that are trained.
        diagnostics: also measure the support loss after and the query accuracy before adaptation, at the
            price of one forward each.

    Raises:
        ValueError: an unknown mode or strategy, a negative count, a non-finite or negative rate, shapes
            that do not fit, or a learned rate where its gradient would be wrong.

    Source: Finn et al. 2017 (arXiv 1703.03400), sections 2.2 and 5.2; for ``sweep``, mixed-mode
    differentiation (arXiv 2505.00793).
    """
    mode, strategy = check_options(mode, strategy, inner_steps, inner_lr, inner_checkpoint)
    check_batch("support", support)
    check_batch("query", query)
    tasks = support[1].shape[0]
    if query[1].shape[0] != tasks:
        raise ValueError(f"support has {tasks} tasks, query has {query[1].shape[0]}")
    task_model = TaskModel(model, adapt)
    loop = InnerLoop(task_model, support, query, inner_steps, inner_lr)
    adapted, shared = task_model.initial(tasks)
    with torch.enable_grad():
        if strategy is Strategy.SWEEP:
            outcome = swept_gradient(loop, adapted, shared, second_order=mode is MetaMode.FULL)
        else:
            outcome = unrolled_gradient(loop, adapted, shared, mode=mode, segment=inner_checkpoint)
    names = (*task_model.adapted_names, *task_model.shared_names)
    sums = (*(g.sum(0) for g in outcome.adapted_grads), *outcome.shared_grads)
    after = before = None
    if diagnostics:
        after = loop.support_loss(outcome.final, shared) / tasks
        with torch.no_grad():
            before = accuracy(task_model.logits(adapted, shared, query[0]), query[1]).mean()
    return MetaGradient(
        loss=outcome.query_loss / tasks,
        grads={name: total / tasks for name, total in zip(names, sums, strict=True)},
        query_accuracy=accuracy(outcome.query_logits, query[1]).mean(),
        support_loss_before=outcome.support_loss_before / tasks,
        support_loss_after=after,
        query_accuracy_before=before,
        inner_lr_grad=None if outcome.inner_lr_grad is None else outcome.inner_lr_grad / tasks,
    )


def check_options(
    mode: MetaMode | str,
    strategy: Strategy | str,
    inner_steps: int,
    inner_lr: float | Tensor,
    inner_checkpoint: int,
) -> tuple[MetaMode, Strategy]:
    """Refuse what `meta_gradient` cannot do; the mode and the strategy as their enumerations.

    Raises:
        ValueError: naming the option, what came and what fits.
    """
    mode, strategy = parse_choice(MetaMode, mode), parse_choice(Strategy, strategy)
    if inner_steps < 0 or inner_checkpoint < 0:
        raise ValueError(
            f"inner_steps and inner_checkpoint must be at least 0, got {inner_steps} and {inner_checkpoint}"
        )
    if inner_checkpoint and (strategy is Strategy.SWEEP or mode is not MetaMode.FULL):
        raise ValueError(
            f"inner_checkpoint={inner_checkpoint} recomputes the graph of an unrolled FULL inner loop;"
            f" {strategy.value} {mode.value} keeps no such graph, leave it at 0"
        )
    if isinstance(inner_lr, Tensor):
        if inner_lr.ndim or not inner_lr.is_floating_point():
            raise ValueError(
                f"inner_lr as a tensor must be one floating-point number, got {inner_lr.dtype} of shape"
                f" {tuple(inner_lr.shape)}"
            )
        if inner_lr.requires_grad and (strategy is Strategy.SWEEP or mode is MetaMode.FO_STRICT):
            raise ValueError(
                f"a learned inner_lr gets no gradient from {strategy.value} {mode.value}, which treats the"
                " rate as a constant; use unrolled FULL or FO"
            )
    elif not 0 <= inner_lr < float("inf"):
        raise ValueError(f"inner_lr must be a finite number of at least 0, got {inner_lr}")
    return mode, strategy
