"""The broken variants by name, each with what it stands for and what an audit has to say about it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from experiments.safety_taxonomy.backwards import (
    RewiredOnce,
    by_formula,
    launched_by_formula,
    recomputed_and_differentiated,
    recomputed_then_detached,
    rewired,
)
from experiments.safety_taxonomy.wrappers import (
    baseline,
    detach_attention_output,
    detach_input,
    no_grad_attention,
    safe_checkpoint,
    scaled_output,
    stats_detach_logits_sdpa,
    stats_detach_softmax_output_sdpa,
)
from theria.curvature import Status, Verdict
from theria.curvature.convention import Attention


@dataclass(frozen=True)
class Variant:
    """A broken attention, and what an audit has to say about it.

    Attributes:
        name: of the wrapper.
        wrap: makes it of a sound attention.
        imitates: the habit of real kernels that it stands for.
        verdict, status: expected.
        collapsed: inputs expected to be named as without curvature.
    """

    name: str
    wrap: Callable[[Attention], Attention]
    imitates: str
    verdict: Verdict
    status: Status = Status.OK
    collapsed: tuple[str, ...] = ()


_ALL = ("query", "key", "value", "cotangent")
_COLLAPSE = Verdict.SILENT_COLLAPSE

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("baseline", baseline, "the implementation itself, unharmed", Verdict.SAFE),
        Variant(
            "detach_attention_output",
            detach_attention_output,
            "caching attention outputs, or passing them through a buffer outside the graph",
            _COLLAPSE,
            collapsed=_ALL,
        ),
        Variant(
            "no_grad_attention",
            no_grad_attention,
            "inference kernels called under torch.no_grad()",
            Verdict.HARD_FAIL,
            Status.HARD_FAIL_UNUSED,
        ),
        Variant(
            "once_differentiable_sim",
            rewired(recomputed_and_differentiated, RewiredOnce),
            "kernels whose backward is marked @once_differentiable",
            Verdict.FIRST_ORDER_ONLY,
            Status.HARD_FAIL_ONCE_DIFF,
        ),
        Variant(
            "stats_detach_logits_sdpa",
            stats_detach_logits_sdpa,
            "logits treated as constants, as in attention-map regularisers and some low-precision paths",
            _COLLAPSE,
            collapsed=("query", "key", "value"),
        ),
        Variant(
            "stats_detach_softmax_output_sdpa",
            stats_detach_softmax_output_sdpa,
            "probabilities stored for later and read back without their graph",
            _COLLAPSE,
            collapsed=("query", "key", "value"),
        ),
        Variant(
            "detach_query",
            detach_input(0),
            "a query computed once and reused, as in decoding with cached states",
            _COLLAPSE,
            collapsed=("query",),
        ),
        Variant(
            "detach_key",
            detach_input(1),
            "keys read back from a cache without their graph",
            _COLLAPSE,
            collapsed=("key",),
        ),
        Variant(
            "detach_value",
            detach_input(2),
            "values read back from a cache without their graph",
            _COLLAPSE,
            collapsed=("value",),
        ),
        Variant(
            "checkpoint",
            safe_checkpoint,
            "non-reentrant activation checkpointing, which is sound",
            Verdict.SAFE,
        ),
        Variant(
            "checkpoint_no_grad",
            rewired(recomputed_and_differentiated),
            "checkpointing that recomputes the forward on detached inputs, as the reentrant kind does",
            _COLLAPSE,
            collapsed=_ALL,
        ),
        Variant(
            "checkpoint_detach_after_recompute",
            rewired(recomputed_then_detached),
            "checkpointing that recomputes with a graph and returns gradients cut from it",
            _COLLAPSE,
            collapsed=_ALL,
        ),
        Variant(
            "raw_kernel_backward",
            rewired(launched_by_formula),
            "a backward that launches its kernels directly, so that gradients come back without a graph",
            _COLLAPSE,
            collapsed=_ALL,
        ),
        Variant(
            "logits_recomputed_no_grad",
            rewired(by_formula(frozen_probabilities=True)),
            "a differentiable backward around probabilities that are recomputed under no_grad",
            _COLLAPSE,
            # value because its own gradient, dV = P^T dO, is then a constant
            collapsed=("query", "key", "value"),
        ),
        Variant(
            "frozen_statistics",
            rewired(by_formula(frozen_statistics=True)),
            "a differentiable backward that takes the saved log-sum-exp for a constant",
            Verdict.WRONG_CURVATURE,
        ),
        Variant(
            "scaled_output",
            scaled_output,
            "a forward off by 1%, as after a wrong rescaling of partial sums",
            Verdict.WRONG_FORWARD,
        ),
        Variant(
            "base_two_gradient",
            rewired(by_formula(factor=math.log(2))),
            "a kernel that computes in powers of two and forgets ln 2 in the gradients of query and key",
            Verdict.WRONG_GRADIENT,
        ),
    )
}
