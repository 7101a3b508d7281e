"""The second-order signal of a sequence classifier at its present parameters, as training runs report it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from theria.curvature.probes import SecondOrderPath, relative_difference, second_order_path
from theria.maml import MetaMode, meta_gradient
from theria.maml.task_model import Batch
from theria.models.seq_classifier import SeqClassifier

ATTENTION = ("q_proj", "k_proj", "v_proj")
"""Modules of the classifier whose gradients come through the attention."""

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class SecondOrderSignal:
    """What second order does at some parameters, with some tasks.

    Attributes:
        rel_diff: |g_FULL - g_FO| / |g_FULL| over all parameters.
        attn_rel_diff: the same over the attention's projections.
        attn_path: curvature of the support loss through the attention's projections, beside that of the
            explicit softmax in float64.
    """

    rel_diff: float
    attn_rel_diff: float
    attn_path: SecondOrderPath


def second_order_signal(
    model: SeqClassifier,
    support: Batch,
    query: Batch,
    *,
    inner_steps: int,
    inner_lr: float,
    adapt: Sequence[str] | None = None,
    seed: int = 0,
) -> SecondOrderSignal:
    """Measure it at the model's own parameters, over its own attention.

    Nothing of the model changes and no global random generator is used.

    Args:
        model: the classifier.
        support, query: x (tasks, batch, length, width) and y (tasks, batch), to adapt to and to judge by.
        inner_steps, inner_lr, adapt: of the inner loop, see `meta_gradient`.
        seed: of the direction in which curvature is taken.

    Raises:
        RuntimeError: what autograd raises where the attention cannot be differentiated twice.
    """
    full, first = full_and_first_order(
        model, support, query, inner_steps=inner_steps, inner_lr=inner_lr, adapt=adapt
    )
    return SecondOrderSignal(
        rel_diff=relative_difference(first, full),
        attn_rel_diff=relative_difference(_of_attention(first), _of_attention(full)),
        attn_path=second_order_path(model, reference_twin(model), support, modules=ATTENTION, seed=seed),
    )


def full_and_first_order(
    model: SeqClassifier,
    support: Batch,
    query: Batch,
    *,
    inner_steps: int,
    inner_lr: float,
    adapt: Sequence[str] | None = None,
) -> tuple[Gradients, Gradients]:
    """FULL and FO meta-gradient of the same tasks at the same parameters, by parameter name."""
    full, first = (
        meta_gradient(
            model, support, query, mode=mode, inner_steps=inner_steps, inner_lr=inner_lr, adapt=adapt
        ).grads
        for mode in (MetaMode.FULL, MetaMode.FO)
    )
    return full, first


def reference_twin(model: SeqClassifier) -> SeqClassifier:
    """A copy in float64 over the explicit softmax."""
    twin = copy.deepcopy(model).double()
    twin.backend = "reference"
    # the same function in a third of the time; in float64 the difference is of the order of 1e-15
    twin.absorb_projections = True
    return twin


def _of_attention(gradients: Mapping[str, Tensor]) -> Gradients:
    return {n: g for n, g in gradients.items() if n.rpartition(".")[0] in ATTENTION}
