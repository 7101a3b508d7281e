r"""What a matrix memory should give back of one pair among many, for random unit keys and values.

A read is r = \sum_j c_j v_j. With values of random directions its cosine with the needle's value v_0 is

    E c_0 / sqrt(E \sum_j c_j^2)

up to fluctuations of the order 1/sqrt(dim). What follows are these expectations over random unit keys, of
which E[k k^T] = I / dim is the whole of it.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from theria.memory.branch import MemoryBranch


def expected_cosine(
    branch: MemoryBranch, *, before: Int64[Tensor, " cases"], after: Int64[Tensor, " cases"]
) -> Float[Tensor, "cases heads"]:
    """The expected cosine for a memory in which so many pairs were written before and after the needle.

    For the Hebbian rule the projected query's share is part of it. For the delta rules it is the cosine read
    by the key itself, a bound for reads with a share: a projected query holds more of the other keys, and so
    of their values. The share that training starts with costs 0.01 to 0.03.

    Args:
        branch: the memory, of which rule, share, scale, persistent vectors and resting decay count.
        before, after: other pairs written before and after the needle.
    """
    dim = branch.projection.dim
    if branch.memory.rule == "hebbian":
        persistent = branch.projection.persistent
        return hebbian_cosine(
            before + after,
            dim,
            share=branch.share,
            scale=branch.projection.scale,
            m_persistent=persistent.m_persistent,
            norm_persistent=persistent.norm_persistent,
        )
    resting = branch.resting_log_decay
    decay = branch.share.new_ones(branch.heads) if resting is None else resting.exp()
    return delta_cosine(before, after, dim, decay=decay)


def hebbian_cosine(
    pairs: Int64[Tensor, " cases"],
    dim: int,
    *,
    share: Float[Tensor, " heads"],
    scale: Float[Tensor, " heads"],
    m_persistent: Float[Tensor, "heads dim dim"],
    norm_persistent: Float[Tensor, " heads"],
) -> Float[Tensor, "cases heads"]:
    r"""Of the Hebbian rule, for the query (1 - s) k_0 + s g M k_0, g = scale / (norm_persistent + n + 1).

    With n other pairs, p = norm_persistent and b = s g,

    .. math::
        c_0 &= 1 - s + b (1 + (n + p) / d), \\
        E c_j^2 &= (1 - s + b (2 + (n - 1 + p) / d))^2 / d + b^2 ((n - 1) + \|M_p\|_F^2 - p^2 / d) / d^2.

    Without the projected query (s = 0) it is 1 / sqrt(1 + n / d).

    Args:
        pairs: n.
        dim: d, width of keys.
        share, scale: s, and what the projected query is multiplied by.
        m_persistent, norm_persistent: as for ``theria.memory.causal_projection``.
    """
    n = pairs[:, None].to(share.dtype)
    b = share * scale / (norm_persistent + n + 1)
    needle = 1 - share + b * (1 + (n + norm_persistent) / dim)
    along = 1 - share + b * (2 + (n - 1 + norm_persistent) / dim)
    spread = n - 1 + m_persistent.square().sum(dim=(-2, -1)) - norm_persistent.square() / dim
    other = along.square() / dim + b.square() * spread / dim**2
    return needle / torch.sqrt(needle.square() + n * other)


def delta_cosine(
    before: Int64[Tensor, " cases"],
    after: Int64[Tensor, " cases"],
    dim: int,
    *,
    decay: Float[Tensor, " heads"],
) -> Float[Tensor, "cases heads"]:
    r"""Of the delta rule with full writes, read by the needle's key itself.

    A write of another key takes the share 1/d of what the needle's key reads, and puts its own value there.
    With rho = 1 - 1/d, u pairs before and m after the needle, and alpha the decay of a token,

    .. math::
        c_0 &= (\alpha \rho)^m, \\
        E \sum_{after} c_j^2 &= \sum_{l<m} \alpha^{2l} \rho^l / d, \\
        E \sum_{before} c_j^2 &= (\rho^m - \rho^{2m}) \sum_{l<u} \alpha^{2(m+1+l)} \rho^l / d.

    Without decay it is rho^m / sqrt(1 - rho^{m+u} (1 - rho^m)): 1 for the newest pair, and less the older the
    needle, whatever was written before it. The Hebbian rule does not tell ages apart.

    Args:
        before, after: u and m.
        dim: d, width of keys.
        decay: alpha of every head; 1 for the rule without a gate.
    """
    rho = 1 - 1 / dim
    alpha = decay.double()
    u, m = (count[:, None].to(alpha.dtype) for count in (before, after))
    ratio = alpha.square() * rho
    c_0 = (alpha * rho) ** m
    later = (1 - ratio**m) / (1 - ratio) / dim
    kept = rho**m - rho ** (2 * m)
    earlier = kept * alpha ** (2 * (m + 1)) * (1 - ratio**u) / (1 - ratio) / dim
    return (c_0 / torch.sqrt(c_0.square() + later + earlier)).to(decay.dtype)
