"""The attention of a run: which function the model calls, and what curvature that very function has."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from experiments.operator_sensitivity.runs import BASELINE, Run
from experiments.safety_taxonomy.variants import VARIANTS, Variant
from theria.attention import registered_backend, scaled_dot_product_attention
from theria.curvature import Case, as_backend, probe_derivatives
from theria.curvature.convention import Attention
from theria.curvature.verdicts import SURVIVING

_INPUTS = ("query", "key", "value")


def variant_named(name: str) -> Variant:
    """A wrapper of attention.

    Raises:
        ValueError: for a name that there is not.
    """
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {name!r}; there are {', '.join(VARIANTS)}")
    return VARIANTS[name]


def attention_of(backend: str, variant: str) -> Attention:
    """The callable under study: a backend with a variant's wrapper around it.

    Raises:
        ValueError: for a variant that there is not.
    """
    return variant_named(variant).wrap(partial(scaled_dot_product_attention, backend=backend))


@contextmanager
def backend_of(run: Run) -> Iterator[str]:
    """The name under which the model finds the run's attention, for the length of a ``with`` block."""
    if run.variant == BASELINE:
        yield run.backend
        return
    attend = attention_of(run.backend, run.variant)
    with registered_backend(f"{run.backend} under {run.variant}", as_backend(attend)) as name:
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
