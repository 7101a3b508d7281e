"""A needle in a prompt: pairs in text, a key asked for beyond attention's reach, and the model's answer.

    filler ... key value ... filler ... key value ... | gap of attention's reach | key ? key ? key ?

The prompts are those of ``theria.tasks.recall``. In its controls nothing can be known: the key was never
stored, or stored in the shard before. A third control is the same model with its memory switched off.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Int64
from scipy import stats
from torch import Tensor

from theria.models.memory_lm import MemoryLM
from theria.models.window_attention import WindowAttention
from theria.tasks.recall import CONTROLS, IGNORED, RecallSpec, answer_distances

MEMORY_OFF = "memory_off"
PROMPT_CONTROLS = (MEMORY_OFF, *CONTROLS[1:])
"""Prompts that no model can answer: without its memory, and without the needle in its shard."""

_CONFIDENCE = 0.95
_CONTROL_CONFIDENCE = 0.999

Sampler = Callable[[RecallSpec, Tensor, str], tuple[Tensor, Tensor, Tensor]]
"""Tokens, labels and segment ids of sequences, for a specification, their numbers and a control of recall."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """All prompts of one length, read in one forward pass.

    Attributes:
        tokens, labels, segment_ids: as ``theria.tasks.recall.RecallBatch`` has them.
        control: what each prompt asks for, by its place in ``theria.tasks.recall.CONTROLS``; 0 for what was
            stored.
        depth: bin of the place of each answer's value; -1 where no answer is asked, or none was stored.
        depths: number of bins.
        chance: what guessing among the values is worth.
    """

    tokens: Int64[Tensor, "prompts length"]
    labels: Int64[Tensor, "prompts length"]
    segment_ids: Int64[Tensor, "prompts length"]
    control: Int64[Tensor, " prompts"]
    depth: Int64[Tensor, "prompts length"]
    depths: int
    chance: float

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return self.tokens.shape[1]


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of right answers.

    Attributes:
        right: how many were,
        asked: of how many.
    """

    right: int
    asked: int

    @property
    def value(self) -> float:
        """Right over asked; NaN where none was asked."""
        return self.right / self.asked if self.asked else float("nan")

    def interval(self, confidence: float = _CONFIDENCE) -> tuple[float, float]:
        """Wilson's score interval (JASA 22, 1927); from 0 to 1 where none was asked."""
        if not self.asked:
            return 0.0, 1.0
        ends = stats.binomtest(self.right, self.asked).proportion_ci(confidence, method="wilson")
        return float(ends.low), float(ends.high)

    @classmethod
    def of(cls, right: Tensor, asked: Tensor) -> "Share":
        """Of the answers asked for."""
        return cls(int((right & asked).sum()), int(asked.sum()))

    @classmethod
    def total(cls, shares: Sequence["Share"]) -> "Share":
        """All of them together."""
        return cls(sum(share.right for share in shares), sum(share.asked for share in shares))


@dataclasses.dataclass(frozen=True)
class PromptRecall:
    """How often a model answers a key with the value stored for it.

    Attributes:
        cells: by length of the prompt, and by depth of the needle: parts of equal width of where needles
            stand, the first at the beginning of the prompt.
        controls: of ``PROMPT_CONTROLS``.
        chance: what guessing among the values is worth.
    """

    cells: Mapping[int, tuple[Share, ...]]
    controls: Mapping[str, Share]
    chance: float

    @property
    def accuracy(self) -> Share:
        """Over all lengths and depths."""
        return Share.total([share for shares in self.cells.values() for share in shares])

    @property
    def by_depth(self) -> tuple[Share, ...]:
        """Over all lengths, by depth."""
        return tuple(Share.total(shares) for shares in zip(*self.cells.values(), strict=True))

    @property
    def leaks(self) -> tuple[str, ...]:
        """Controls that are answered better than by chance, of which 1 in 1000 would be by chance."""
        return tuple(
            name
            for name, share in self.controls.items()
            if share.interval(_CONTROL_CONFIDENCE)[0] > self.chance
        )

    def passes(self, threshold: float = 0.8) -> bool:
        """Whether that many are right, and only where the memory can know."""
        return self.accuracy.value >= threshold and not self.leaks


def attention_reach(model: MemoryLM) -> int:
    """Tokens that the attention of all blocks together reaches back, blocks x (window - 1)."""
    return sum(module.window - 1 for module in model.modules() if isinstance(module, WindowAttention))


def needle_spec(spec: RecallSpec, *, length: int, reach: int, pairs: int, queries: int) -> RecallSpec:
    """Prompts of a given length, of the same tokens, in which attention reaches no value.

    Args:
        spec: of which keys, values and noise are taken.
        length: tokens of a prompt.
        reach: tokens that attention reaches back, blocks x (window - 1).
        pairs, queries: in a prompt; queries stand side by side at its end.

    Raises:
        ValueError: a prompt is too short for its pairs beyond the reach, or what ``RecallSpec`` refuses.
    """
    return dataclasses.replace(
        spec,
        length=length,
        min_pairs=pairs,
        max_pairs=pairs,
        queries=queries,
        query_span=2 * queries,
        min_distance=reach,
    )


def make_prompts(sample: Sampler, spec: RecallSpec, *, prompts: int, controls: int, depths: int) -> Prompts:
    """Prompts of one length with their controls, on the CPU.

    Args:
        sample: draws them.
        spec: of ``needle_spec``.
        prompts: how many ask for what was stored.
        controls: how many of each control, at most ``prompts``; those without the memory are the first of
            the prompts themselves.
        depths: bins of the place of a needle.

    Raises:
        ValueError: for numbers out of their range, or what ``sample`` refuses.
    """
    if not 1 <= controls <= prompts or depths < 1:
        raise ValueError(
            "expected 1 <= controls <= prompts and at least 1 depth, received "
            f"{controls}, {prompts} and {depths}"
        )
    parts = []
    for number, control in enumerate(CONTROLS):
        tokens, labels, segment_ids = sample(spec, torch.arange(controls if number else prompts), control)
        distance = answer_distances(tokens, labels)
        place = torch.arange(spec.length) - distance
        depth = (place * depths).div(spec.pair_span, rounding_mode="floor").where(distance >= 0, -1)
        parts.append((tokens, labels, segment_ids, torch.full((len(tokens),), number), depth))
    tokens, labels, segment_ids, control_ids, depth = map(torch.cat, zip(*parts, strict=True))
    return Prompts(tokens, labels, segment_ids, control_ids, depth, depths, 1 / spec.num_values)


@torch.no_grad()
def probe_prompts(model: MemoryLM, prompts: Sequence[Prompts]) -> PromptRecall:
    """Ask the model every prompt, those of a length in one forward pass, and some again without its memory.

    Args:
        model: any, on any device; its ``memory_enabled`` is put back.
        prompts: of ``make_prompts``, each of another length.

    Raises:
        ValueError: for no prompts, or two of one length.
    """
    lengths = [asked.length for asked in prompts]
    if not lengths or len(set(lengths)) < len(lengths):
        raise ValueError(f"expected prompts of one or more different lengths, received {lengths}")
    cells: dict[int, tuple[Share, ...]] = {}
    controls: dict[str, list[Share]] = {name: [] for name in PROMPT_CONTROLS}
    for asked in prompts:
        answers = asked.labels != IGNORED
        right = _right(model, asked, len(answers), memory=True)
        stored = asked.control[:, None] == 0
        cells[asked.length] = tuple(
            Share.of(right, answers & stored & (asked.depth == bin_)) for bin_ in range(asked.depths)
        )
        for number, name in enumerate(CONTROLS[1:], start=1):
            controls[name].append(Share.of(right, answers & (asked.control[:, None] == number)))
        few = int((asked.control == 1).sum())
        off = _right(model, asked, few, memory=False)
        controls[MEMORY_OFF].append(Share.of(off, answers[:few]))
    totals = {name: Share.total(shares) for name, shares in controls.items()}
    return PromptRecall(cells, totals, prompts[0].chance)


def _right(model: MemoryLM, prompts: Prompts, count: int, *, memory: bool) -> Bool[Tensor, "count length"]:
    """Where the likeliest token is the label, over the first prompts, on the CPU."""
    device = model.embedding.weight.device
    enabled, model.memory_enabled = model.memory_enabled, memory
    try:
        logits = model(
            prompts.tokens[:count].to(device), segment_ids=prompts.segment_ids[:count].to(device)
        ).logits
    finally:
        model.memory_enabled = enabled
    return logits.argmax(dim=-1).cpu() == prompts.labels[:count]
