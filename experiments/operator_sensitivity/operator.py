"""The attention of a run: which function the model calls, and what curvature that very function has."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from experiments.operator_sensitivity.runs import BASELINE, Run
from experiments.safety_taxonomy.variants import VARIANTS
from theria.attention import registered_backend, scaled_dot_product_attention
from theria.attention.call import CausalAlignment
from theria.curvature import Case, probe_derivatives, second_order_path
from theria.curvature.convention import Attention
from theria.curvature.verdicts import SURVIVING
from theria.maml.task_model import Batch
from theria.models.seq_classifier import SeqClassifier

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj")
_INPUTS = ("query", "key", "value")


def attention_of(backend: str, variant: str) -> Attention:
    """The callable under study: a backend with a variant's wrapper around it.

    Raises:
        ValueError: for a variant that there is not.
    """
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}; there are {', '.join(VARIANTS)}")
    return VARIANTS[variant].wrap(partial(scaled_dot_product_attention, backend=backend))


@contextmanager
def backend_of(run: Run) -> Iterator[str]:
    """The name under which the model finds the run's attention, for the length of a ``with`` block."""
    if run.variant == BASELINE:
        yield run.backend
        return
    attend = attention_of(run.backend, run.variant)

    def backend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool,
        window: int | None,
        causal_alignment: CausalAlignment,
        scale: float,
        enable_gqa: bool,
    ) -> Tensor:
        return attend(query, key, value, is_causal=is_causal)

    with registered_backend(f"{run.backend} under {run.variant}", backend) as name:
        yield name


def second_order_ok(run: Run, *, seed: int = 0) -> bool:
    """Whether second order straight through the run's attention runs and keeps every input's curvature.

    The probe is `theria.curvature.probe_derivatives` of the callable that trains, in the shape of its call,
    on its device: one query, the task's length and width.
    """
    case = Case(batch=2, heads=1, queries=1, keys=run.seq_len, dim=run.width)
    probe = probe_derivatives(
        attention_of(run.backend, run.variant), case, device=torch.device(run.device), seed=seed
    )
    surviving = probe.surviving
    return probe.failure is None and all(surviving.get(name, 0.0) >= SURVIVING for name in _INPUTS)


def second_order_magnitude(model: SeqClassifier, support: Batch, *, seed: int = 0) -> float:
    """Curvature of the support loss through the attention's projections, relative to the explicit softmax.

    |H u| / |H_ref u| in the space of q_proj, k_proj and v_proj at the model's own parameters, see
    `theria.curvature.second_order_path`: 1 for sound attention, 0 where the attention's curvature is gone.
    """
    reference = copy.deepcopy(model).double()
    reference.backend = "reference"
    # the same function in a third of the time; in float64 the difference is of the order of 1e-15
    reference.absorb_projections = True
    return second_order_path(model, reference, support, modules=ATTENTION_MODULES, seed=seed).magnitude
