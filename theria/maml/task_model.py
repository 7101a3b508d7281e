"""One model, many tasks: parameters stacked along a leading task dimension, the forward vmapped over it."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
"""x (tasks, batch, ...), the inputs, and y (tasks, batch), their integer labels; see `check_batch`."""


class TaskModel:
    """A classifier seen as a function of per-task parameters.

    The trained parameters (``requires_grad``) fall into two sets: those the inner loop adapts, of which
    every task owns a copy, and those it leaves alone, which all tasks share. Frozen parameters and
    buffers are constants.

    Args:
        model: maps x (batch, length, width) to logits (batch, classes); called through ``vmap``.
        adapt: names of modules or parameters the inner loop adapts ("head" covers ``head.weight`` and
            ``head.bias``); None adapts every trained parameter.

    Raises:
        ValueError: a name in ``adapt`` covers no trained parameter, or the model has none.
    """

    def __init__(self, model: nn.Module, adapt: Sequence[str] | None = None) -> None:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                f"{type(model).__name__} has no parameter with requires_grad, nothing to meta-learn"
            )
        self.model = model
        self.adapted_names = trained if adapt is None else _covered(trained, adapt)
        adapted = set(self.adapted_names)
        self.shared_names = [name for name in trained if name not in adapted]

    def initial(self, tasks: int) -> tuple[list[Tensor], list[Tensor]]:
        """Copies cut from the model: adapted parameters (tasks, ...), one a task, and the shared ones."""
        parameters = dict(self.model.named_parameters())
        stacked = [
            parameters[name].detach().expand(tasks, *parameters[name].shape).clone()
            for name in self.adapted_names
        ]
        return stacked, [parameters[name].detach().clone() for name in self.shared_names]

    def logits(
        self,
        adapted: Sequence[Tensor],
        shared: Sequence[Tensor],
        x: Float[Tensor, "tasks batch length width"],
    ) -> Float[Tensor, "tasks batch classes"]:
        """Every task's logits under its own parameters."""

        def one_task(own: Sequence[Tensor], common: Sequence[Tensor], inputs: Tensor) -> Tensor:
            names = (*self.adapted_names, *self.shared_names)
            return functional_call(self.model, dict(zip(names, (*own, *common), strict=True)), (inputs,))

        return vmap(one_task, in_dims=(0, None, 0))(list(adapted), list(shared), x)

    def total_loss(
        self, adapted: Sequence[Tensor], shared: Sequence[Tensor], batch: Batch
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "tasks batch classes"]]:
        """Sum over tasks of their mean cross-entropies, and the logits.

        The sum alone is differentiated: tasks do not mix, so its gradient by the stacked parameters holds
        every task's own.
        """
        x, y = batch
        logits = self.logits(adapted, shared, x)
        summed = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        return summed / y.shape[1], logits


def cross_entropy(
    logits: Float[Tensor, "tasks batch classes"], y: Int[Tensor, "tasks batch"]
) -> Float[Tensor, " tasks"]:
    """Every task's mean over its batch of -log softmax(logits)[y], in nats."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def accuracy(
    logits: Float[Tensor, "tasks batch classes"], y: Int[Tensor, "tasks batch"]
) -> Float[Tensor, " tasks"]:
    """Share of the batch whose largest logit is the label."""
    return (logits.detach().argmax(-1) == y).to(logits.dtype).mean(1)


def descend(adapted: Iterable[Tensor], gradients: Iterable[Tensor], inner_lr: float | Tensor) -> list[Tensor]:
    """One step of gradient descent, theta - inner_lr g, out of place."""
    if isinstance(inner_lr, Tensor):
        return [p - inner_lr * g for p, g in zip(adapted, gradients, strict=True)]
    return [torch.add(p, g, alpha=-inner_lr) for p, g in zip(adapted, gradients, strict=True)]


def check_batch(name: str, batch: Batch) -> None:
    """Refuse shapes that are not x (tasks, batch, ...) with integer y (tasks, batch).

    Raises:
        ValueError: naming the set and the shapes that came.
    """
    x, y = batch
    if y.ndim != 2 or x.shape[:2] != y.shape or 0 in y.shape:
        raise ValueError(
            f"{name} expects x (tasks, batch, ...) and y (tasks, batch), both non-empty,"
            f" got x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    if y.is_floating_point() or y.dtype is torch.bool:
        raise ValueError(f"{name} expects integer class labels y, got {y.dtype}")


def _covered(trained: list[str], adapt: Sequence[str]) -> list[str]:
    for prefix in adapt:
        if not any(_covers(prefix, name) for name in trained):
            raise ValueError(
                f"adapt names {prefix!r}, which covers no trained parameter; there are {trained}"
            )
    return [name for name in trained if any(_covers(prefix, name) for prefix in adapt)]


def _covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
