"""The scores of all pairs of samples, from their gradients: one matrix product over heads a variant."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from theria.interference.fisher import Ridge, as_ridge

VARIANTS = ("directional", "signed", "symmetric")


def score_matrices(
    gradients_a: Tensor,
    gradients_b: Tensor,
    fisher: Tensor,
    *,
    variants: Sequence[str] = VARIANTS,
    ridge: Ridge | float | int = Ridge(),  # noqa: B008 (immutable)
) -> dict[str, Tensor]:
    r"""Scores of every pair of samples in every head, from given gradients of one tensor.

        directional  M_ij = sum_k g_ik^2 |g_jk| / I_k
        signed       M_ij = sum_k g_ik g_jk / I_k
        symmetric    M_ij = sum_k |g_ik| |g_jk| / I_k

    k runs over the entries of a head's slice and I_k is what ``ridge`` makes of the Fisher information. An
    entry with I = 0 contributes 0.

    Args:
        gradients_a: (samples of A, heads, entries).
        gradients_b: (samples of B, heads, entries).
        fisher: (heads, entries), the Fisher information I without ridge.
        variants: which of the above.
        ridge: see `Ridge`; a number is an absolute one.

    Returns:
        (heads, samples of A, samples of B) by variant.

    Raises:
        ValueError: for shapes or dtypes that do not fit one another, half precision, or an unknown variant.
    """
    check_variants(variants)
    shapes = tuple(gradients_a.shape), tuple(gradients_b.shape), tuple(fisher.shape)
    if fisher.ndim != 2 or any(len(s) != 3 or s[1:] != shapes[2] for s in shapes[:2]):
        raise ValueError(
            "expected gradients (samples, heads, entries) of both tasks and a Fisher information "
            f"(heads, entries), received {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    dtypes = {gradients_a.dtype, gradients_b.dtype, fisher.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(f"gradients and Fisher must all be float32, or all float64, received {dtypes}")
    divisor = as_ridge(ridge).denominator(fisher, fisher.mean())
    scores = empty_scores(variants, (shapes[2][0], shapes[0][0], shapes[1][0]), fisher)
    add_scores(scores, gradients_a, gradients_b.clone(), weights(divisor.value, divisor.zero))
    return scores


def check_variants(variants: Sequence[str]) -> None:
    """Raise ValueError unless the variants are known and there is at least one."""
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or not variants:
        raise ValueError(f"variants must be among {', '.join(VARIANTS)}, received {tuple(variants)!r}")


def weights(denominator: Float[Tensor, "*entries"], zero: Tensor) -> Float[Tensor, "*entries"]:
    """1 / I with its ridge, 0 where I is 0."""
    return torch.where(zero, 0.0, 1 / denominator)


def empty_scores(variants: Sequence[str], shape: tuple[int, int, int], like: Tensor) -> dict[str, Tensor]:
    """Zeros (heads, samples of A, samples of B) for each variant."""
    return {variant: like.new_zeros(shape) for variant in variants}


def add_scores(
    scores: Mapping[str, Float[Tensor, "heads a b"]],
    gradients_a: Float[Tensor, "a heads entries"],
    gradients_b: Float[Tensor, "b heads entries"],
    weight: Float[Tensor, "heads entries"],
    scratch: Float[Tensor, "a heads entries"] | None = None,
) -> None:
    """Add what these entries contribute to the scores; ``gradients_b`` become their absolute values.

    Args:
        scores: added to, by variant.
        gradients_a, gradients_b: of the tasks. They may share samples in memory.
        weight: of the entries, 1 / I.
        scratch: overwritten; memory for what is made of task A's gradients, new by default.
    """
    # g_i / I; in place of it |g_i| / I and then g_i^2 / I, so that three variants need one buffer
    left = torch.mul(gradients_a, weight, out=scratch)
    if "signed" in scores:
        _add_products(scores["signed"], left, gradients_b)
    gradients_b.abs_()
    if "symmetric" in scores:
        _add_products(scores["symmetric"], left.abs_(), gradients_b)
    if "directional" in scores:
        _add_products(scores["directional"], left.mul_(gradients_a).abs_(), gradients_b)


def _add_products(
    total: Float[Tensor, "heads a b"],
    left: Float[Tensor, "a heads entries"],
    right: Float[Tensor, "b heads entries"],
) -> None:
    total.baddbmm_(left.transpose(0, 1), right.permute(1, 2, 0))
