"""How much of the meta-gradient second order makes, by depth of the inner loop, with and without collapse."""

from collections.abc import Iterable, Sequence
from functools import partial

import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from experiments.safety_taxonomy.variants import VARIANTS
from theria.attention import registered_backend, scaled_dot_product_attention
from theria.curvature import as_backend, full_and_first_order, relative_difference
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

PUBLISHED = {
    "baseline": {1: 0.145, 5: 0.631, 10: 0.709, 20: 0.728},
    "detach_attention_output": {1: 0.060, 5: 0.342, 10: 0.703, 20: 1.072},
}
"""rel_diff_mean by variant and inner steps, for the reference backend, one step, inner rate 0.4, seed 0."""

COMPARED = (*PUBLISHED, "raw_kernel_backward")
"""The last one loses curvature alone: its first-order gradients are right."""

_TASKS, _INNER_LR = 16, 0.4


def differences_by_depth(
    inner_steps: Sequence[int], seeds: Iterable[int], device: torch.device
) -> pd.DataFrame:
    """|FULL - FO| / |FULL| at initialisation, for the baseline and for two ways to lose curvature.

    A seed draws the parameters and one meta-batch of the frozen study (16 tasks, inner rate 0.4), the same
    for all. ``meta_gradient_rel_error`` is how far a variant's FULL meta-gradient is from the baseline's.

    Returns:
        Rows of variant, inner_steps, seed, rel_diff, meta_gradient_rel_error.
    """
    found = []
    for seed in track(list(seeds), "seeds"):
        for count in inner_steps:
            right: dict[str, Tensor] = {}
            for name in COMPARED:
                full, first_order = _meta_gradients(name, count, seed, device)
                right = right or full
                found.append(
                    {
                        "variant": name,
                        "inner_steps": count,
                        "seed": seed,
                        "rel_diff": relative_difference(first_order, full),
                        "meta_gradient_rel_error": relative_difference(full, right),
                    }
                )
    return pd.DataFrame(found)


def _meta_gradients(
    variant: str, inner_steps: int, seed: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FULL and FO meta-gradient of the frozen study's first meta-batch."""
    spec = SeqClsSpec()
    attend = VARIANTS[variant].wrap(partial(scaled_dot_product_attention, backend="reference"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = SeqClassifier(spec.width, spec.num_classes, backend="reference").to(device)
    ids = torch.arange(_TASKS, device=device)
    batch = sample_tasks(spec, ids, seed=seed, epoch=0, stream="train")
    with registered_backend("variant", as_backend(attend)) as model.backend:
        return full_and_first_order(model, batch[:2], batch[2:4], inner_steps=inner_steps, inner_lr=_INNER_LR)
