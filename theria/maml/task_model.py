"""One model, many tasks: parameters stacked along a leading task dimension, the forward vmapped over it."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

_NO_LABEL = torch.iinfo(torch.int64).min

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
        ValueError: ``adapt`` is empty or a name in it covers no trained parameter, the model has none, or a
            module with parameters stands in it under two names.
    """

    def __init__(self, model: nn.Module, adapt: Sequence[str] | None = None) -> None:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                f"{type(model).__name__} has no parameter with requires_grad, nothing to meta-learn"
            )
        _refuse_aliases(model)
        self.model = model
        self.adapted_names = trained if adapt is None else _covered(trained, adapt)
        adapted = set(self.adapted_names)
        self.shared_names = [name for name in trained if name not in adapted]
        self.all_stacked = len(self.adapted_names) == sum(1 for _ in model.named_parameters())

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
        """Every task's logits under its own parameters.

        A model may offer ``forward_stacked(parameters, x)`` for parameters that are all stacked; any other
        is vmapped.
        """
        stacked = getattr(self.model, "forward_stacked", None)
        if stacked is not None and self.all_stacked:
            return stacked(dict(zip(self.adapted_names, adapted, strict=True)), x)

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
        return _cross_entropy(logits, y, "sum") / y.shape[1], logits


def cross_entropy(
    logits: Float[Tensor, "tasks batch classes"], y: Int[Tensor, "tasks batch"]
) -> Float[Tensor, " tasks"]:
    """Every task's mean over its batch of -log softmax(logits)[y], in nats."""
    return _cross_entropy(logits, y, "none").view(y.shape).mean(1)


def _cross_entropy(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    """In float32 at least, since a sum over tasks passes the range of half precision; no label is ignored."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction, ignore_index=_NO_LABEL)


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
    if y.dtype is not torch.int64:
        raise ValueError(f"{name} expects class labels y of torch.int64, got {y.dtype}")


def _refuse_aliases(model: nn.Module) -> None:
    """torch.func.functional_call would leave the parameters of such a module destroyed."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names and any(True for _ in module.parameters()):
            raise ValueError(
                f"{name} and {names[module]} are one module, which torch.func.functional_call cannot swap:"
                " keep it under one name and use it twice in forward"
            )
        names[module] = name


def _covered(trained: list[str], adapt: Sequence[str]) -> list[str]:
    if not adapt:
        raise ValueError("adapt is empty, so that nothing would adapt; None adapts every trained parameter")
    for prefix in adapt:
        if not any(_covers(prefix, name) for name in trained):
            raise ValueError(
                f"adapt names {prefix!r}, which covers no trained parameter; there are {trained}"
            )
    return [name for name in trained if any(_covers(prefix, name) for prefix in adapt)]


def _covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
