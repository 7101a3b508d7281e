"""A needle in a memory: one pair written among many random ones, and what its key reads back.

The memory is asked through ``MemoryBranch.write_and_read``, the code that trains: its projection with its
persistent vectors, its rule, its share of the projected query, its chunk size and its kernel. Only what is
written is chosen here: unit keys and values of chance instead of those of tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from theria.memory.accumulator import widened
from theria.memory.branch import MemoryBranch
from theria.memory.needle_theory import expected_cosine
from theria.t_interval import t_half_width

CAPACITY_PAIRS = (10, 25, 50, 100, 200)
_CONFIDENCE = 0.95
_CONTROL_CONFIDENCE = 0.999


class Haystack(NamedTuple):
    """Random unit vectors: a needle, pairs to bury it among, and a key that is never written.

    Attributes:
        keys, values: of the other pairs, in the order of writing.
        needle: its key and its value.
        unknown: the key that is never written.
        depth: in [0, 1), the share of the other pairs that is written before the needle.
    """

    keys: Float[Tensor, "repetitions heads pairs dim"]
    values: Float[Tensor, "repetitions heads pairs dim"]
    needle: Float[Tensor, "2 repetitions heads dim"]
    unknown: Float[Tensor, "repetitions heads dim"]
    depth: Float[Tensor, " repetitions"]

    def like(self, branch: MemoryBranch) -> "Haystack":
        """The same on a memory's device and in its dtype; depths stay float32."""
        to = branch.share_logit
        keys, values, needle, unknown = (part.to(to) for part in self[:4])
        return Haystack(keys, values, needle, unknown, self.depth.to(to.device))


class NeedleReads(NamedTuple):
    """Cosines with the needle's value of what two keys read back.

    Attributes:
        stored: of the needle's key.
        never_stored: of the unknown key.
        theory: of the needle's key, as ``expected_cosine`` has it.
    """

    stored: Float[Tensor, "repetitions heads"]
    never_stored: Float[Tensor, "repetitions heads"]
    theory: Float[Tensor, "repetitions heads"]


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over repetitions, with its interval by Student's t.

    Attributes:
        value: the mean.
        low, high: ends of its 95% interval; infinite for a single repetition.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor, confidence: float = _CONFIDENCE) -> "Mean":
        """Of one number a repetition."""
        mean, count = float(values.mean()), len(values)
        if count < 2:
            return cls(mean, -torch.inf, torch.inf)
        half = t_half_width(float(values.std()), count, confidence)
        return cls(mean, mean - half, mean + half)


@dataclasses.dataclass(frozen=True)
class NeedleRecall:
    """How well memories give a needle back from among so many other pairs.

    Attributes:
        pairs: the other pairs.
        cosine: between the value read back by the needle's key and the value written, over all memories.
        worst: the least mean of any single head of any block.
        theory: what ``cosine`` should be.
        never_stored: the same cosine for a key that was never written: 0 in expectation.
        leaks: whether ``never_stored`` is away from 0 by more than chance, in 999 of 1000 cases.
    """

    pairs: int
    cosine: Mean
    worst: float
    theory: float
    never_stored: Mean
    leaks: bool

    def passes(self, threshold: float = 0.8) -> bool:
        """Whether every head gives the value back, and no key does that was never written."""
        return self.worst >= threshold and not self.leaks


def memory_branches(model: nn.Module) -> list[MemoryBranch]:
    """The memories of a model, in its order; none where it has none."""
    return [module for module in model.modules() if isinstance(module, MemoryBranch)]


def draw_haystack(repetitions: int, heads: int, pairs: int, dim: int, *, seed: int) -> Haystack:
    """Vectors for so many repetitions, float32 on the CPU, from a generator of their own.

    Depths are spread over [0, 1), one at a random place in each of as many equal parts.

    Raises:
        ValueError: for sizes below 1.
    """
    for name, size in (("repetitions", repetitions), ("heads", heads), ("pairs", pairs), ("dim", dim)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, received {size}")
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, dim, generator=generator), dim=-1)

    places = torch.arange(repetitions) + torch.rand(repetitions, generator=generator)
    return Haystack(
        keys=unit(repetitions, heads, pairs),
        values=unit(repetitions, heads, pairs),
        needle=unit(2, repetitions, heads),
        unknown=unit(repetitions, heads),
        # rounding must not put the last one behind the end
        depth=(places / repetitions).clamp_max(1 - 2**-20),
    )


@torch.no_grad()
def read_needle(branch: MemoryBranch, haystack: Haystack, *, pairs: int) -> NeedleReads:
    """Write the needle among the first ``pairs`` other pairs of the haystack, and read it back.

    All in one call of ``write_and_read``: pairs + 1 tokens that write at full strength (beta 1) and two that
    only read, with a key of length 0. A gated rule forgets as it does where a token says nothing about it.

    Args:
        branch: the memory, on the device and with the heads of the haystack.
        haystack: of ``draw_haystack``, with at least as many pairs.
        pairs: to write beside the needle.

    Raises:
        ValueError: the haystack is not of the memory's sizes.
    """
    _, heads, most, dim = haystack.keys.shape
    if (heads, dim) != (branch.heads, branch.projection.dim) or not 1 <= pairs <= most:
        raise ValueError(
            f"expected a haystack of {branch.heads} heads of width {branch.projection.dim} and at least "
            f"pairs = {pairs} >= 1 pairs, received {heads}, {dim} and {most}"
        )
    before = (haystack.depth * (pairs + 1)).to(torch.int64)
    needle_key, needle_value = haystack.needle
    k = _inserted(haystack.keys[:, :, :pairs], needle_key, before)
    v = _inserted(haystack.values[:, :, :pairs], needle_value, before)
    asked = torch.stack((needle_key, haystack.unknown), dim=2)
    nothing = torch.zeros_like(asked)
    q = torch.cat((torch.zeros_like(k), asked), dim=2)
    k, v = torch.cat((k, nothing), dim=2), torch.cat((v, nothing), dim=2)
    resting = branch.resting_log_decay
    log_decay = None if resting is None else resting[:, None].expand(q.shape[:3])
    read, _, _ = branch.write_and_read(q, k, v, log_decay=log_decay)
    cosine = F.cosine_similarity(widened(read[:, :, -2:]), widened(needle_value).unsqueeze(2), dim=-1)
    theory = expected_cosine(branch, before=before, after=pairs - before)
    return NeedleReads(cosine[..., 0], cosine[..., 1], theory)


def probe_memories(branches: Sequence[MemoryBranch], haystack: Haystack, *, pairs: int) -> NeedleRecall:
    """Bury the haystack's needle in every memory and read it back; waits for the device once.

    Args:
        branches: memories of equal sizes, see ``memory_branches``.
        haystack: of their sizes, in their dtype, on their device.
        pairs: as for ``read_needle``.

    Raises:
        ValueError: for no memory, or a haystack that is not of their sizes.
    """
    if not branches:
        raise ValueError("expected at least one memory, received none")
    reads = [read_needle(branch, haystack, pairs=pairs) for branch in branches]
    # (kind, blocks, repetitions, heads)
    stored, never, theory = torch.stack(
        [torch.stack([part.double() for part in parts]) for parts in zip(*reads, strict=True)]
    ).cpu()
    # vectors are drawn once for all blocks, so repetitions are what is independent
    control = never.mean(dim=(0, 2))
    wide = Mean.of(control, _CONTROL_CONFIDENCE)
    return NeedleRecall(
        pairs=pairs,
        cosine=Mean.of(stored.mean(dim=(0, 2))),
        worst=float(stored.mean(dim=1).min()),
        theory=float(theory.mean()),
        never_stored=Mean.of(control),
        leaks=not wide.low <= 0 <= wide.high,
    )


def _inserted(
    others: Float[Tensor, "repetitions heads pairs dim"],
    one: Float[Tensor, "repetitions heads dim"],
    before: Int64[Tensor, " repetitions"],
) -> Float[Tensor, "repetitions heads pairs_and_1 dim"]:
    """The others in their order with the one among them, behind the first ``before`` of them."""
    pairs = others.shape[2]
    place = torch.arange(pairs + 1, device=others.device)
    # the place of the one takes from the last row, where it stands for the gathering
    source = torch.where(place < before[:, None], place, place - 1)
    source = torch.where(place == before[:, None], pairs, source)
    stood = torch.cat((others, one.unsqueeze(2)), dim=2)
    return stood.gather(2, source[:, None, :, None].expand_as(stood))
