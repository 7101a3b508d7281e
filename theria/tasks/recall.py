"""Associative recall: pairs of a key and a value among filler, and later some of the keys, to be answered.

    filler ... key value ... filler ... key value ... | gap | ... key ANSWER ... filler ... key ANSWER ...

Keys and values are tokens of their own. Only the answers have labels. Sequence i is a function of (seed,
stream, epoch, i) and the specification alone, so it comes out the same in any batch, on any worker and rank.
"""

import dataclasses
from enum import IntEnum
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from theria.tasks.philox import WORD_BITS, philox_4x32, uniform_integers
from theria.tasks.synthetic_seqcls import STREAMS, Stream

CONTROLS = ("none", "never_stored", "previous_shard")

IGNORED = -100
"""Label of a token that has no answer, as ``torch.nn.functional.cross_entropy`` leaves it out."""

_WORDS_PER_BLOCK = 4
_PURPOSE_SHIFT = 8


class _Purpose(IntEnum):
    """What a random word is for; numbers that no other task uses."""

    COUNT = 64
    PAIR_SLOTS = 65
    KEYS = 66
    VALUES = 67
    QUERY_SLOTS = 68
    NOISE = 69


@dataclasses.dataclass(frozen=True)
class RecallSpec:
    """The shape and difficulty of associative-recall sequences.

    Attributes:
        length: tokens a sequence.
        min_pairs, max_pairs: the number of pairs is uniform between them, both included.
        queries: keys asked for, each another one; at most ``min_pairs``.
        query_span: the last tokens of a sequence, among which the queries stand.
        min_distance: tokens between every value stored and every query, at least. Beyond
            blocks x (window - 1) attention alone cannot reach.
        first_key, num_keys: the tokens first_key .. first_key + num_keys - 1 are keys.
        first_value, num_values: likewise values; guessing is right once in num_values.
        num_noise: noise is made of the tokens 0 .. num_noise - 1.

    Raises:
        ValueError: for values that make no sequence.
    """

    length: int = 512
    min_pairs: int = 8
    max_pairs: int = 64
    queries: int = 8
    query_span: int = 64
    min_distance: int = 0
    first_key: int = 256
    num_keys: int = 128
    first_value: int = 384
    num_values: int = 64
    num_noise: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.min_pairs <= self.max_pairs <= self.num_keys:
            raise ValueError(
                "expected 1 <= queries <= min_pairs <= max_pairs <= num_keys, received "
                f"{self.queries}, {self.min_pairs}, {self.max_pairs}, {self.num_keys}"
            )
        if self.query_span < 2 * self.queries or self.pair_span < 2 * self.max_pairs:
            raise ValueError(
                f"{self.queries} queries need {2 * self.queries} tokens of query_span {self.query_span}, and "
                f"{self.max_pairs} pairs need {2 * self.max_pairs} tokens of the {self.pair_span} that "
                f"length {self.length} leaves before them at min_distance {self.min_distance}"
            )
        if min(self.min_distance, self.first_key, self.first_value) < 0 or self.num_noise < 1:
            raise ValueError(
                "min_distance, first_key and first_value must be at least 0 and num_noise at least 1, "
                f"received {self.min_distance}, {self.first_key}, {self.first_value} and {self.num_noise}"
            )
        if self.num_values < 2 or self._overlap():
            raise ValueError(
                f"keys and values must be different tokens and at least 2 values, received first_key "
                f"{self.first_key}, num_keys {self.num_keys}, first_value {self.first_value}, num_values "
                f"{self.num_values}"
            )

    @property
    def pair_span(self) -> int:
        """The first tokens of a sequence, among which the pairs stand."""
        return self.length - self.query_span - self.min_distance

    @property
    def vocab(self) -> int:
        """Tokens that a model of these sequences must know."""
        return max(self.first_key + self.num_keys, self.first_value + self.num_values, self.num_noise)

    def check_control(self, control: str) -> None:
        """Raise ValueError for "never_stored" with fewer than max_pairs + queries keys."""
        if control == "never_stored" and self.num_keys < self.max_pairs + self.queries:
            raise ValueError(
                f"control 'never_stored' needs max_pairs + queries = {self.max_pairs + self.queries} keys, "
                f"the specification has {self.num_keys}"
            )

    def _overlap(self) -> bool:
        return (
            self.first_key < self.first_value + self.num_values
            and self.first_value < self.first_key + self.num_keys
        )


class RecallBatch(NamedTuple):
    """Sequences with their answers.

    Attributes:
        tokens: what the model reads; after a query stands its answer.
        labels: at a query the answer, which is the next token; elsewhere ``IGNORED``.
        segment_ids: 0; under the control "previous_shard", 1 behind the pairs.
        query_positions: where the queried keys stand, in no order.
        value_positions: where the value of each query was stored; -1 where it never was.
        num_pairs: pairs of each sequence.
    """

    tokens: Int64[Tensor, "batch length"]
    labels: Int64[Tensor, "batch length"]
    segment_ids: Int64[Tensor, "batch length"]
    query_positions: Int64[Tensor, "batch queries"]
    value_positions: Int64[Tensor, "batch queries"]
    num_pairs: Int64[Tensor, " batch"]


def sample_recall(
    spec: RecallSpec,
    sequence_ids: Int64[Tensor, " batch"],
    *,
    seed: int,
    epoch: int,
    stream: str,
    filler: Int64[Tensor, "batch length"] | None = None,
    control: str = "none",
) -> RecallBatch:
    """The sequences of the given numbers, on the device of sequence_ids, which is not read back.

    Under a control the answers are uniform and independent of all that the model may use, so that any model
    is right once in num_values: "never_stored" asks for keys without a pair, "previous_shard" puts a
    shard boundary between the pairs and the queries.

    Args:
        spec: the shape of a sequence.
        sequence_ids: numbers in [0, 2^32).
        seed: in [0, 2^64).
        epoch: in [0, 2^32).
        stream: "train", "validation" or "test": no two share a random word.
        filler: tokens to stand where no pair and no query does, text for instance; noise if None.
        control: what to ask for.

    Raises:
        ValueError: for an unknown stream or control, a number out of range, or "never_stored" with fewer than
            max_pairs + queries keys.
    """
    if stream not in STREAMS or control not in CONTROLS:
        raise ValueError(
            f"stream must be one of {', '.join(STREAMS)} and control one of {', '.join(CONTROLS)}, "
            f"received {stream!r} and {control!r}"
        )
    if not 0 <= epoch < 2**WORD_BITS:
        raise ValueError(f"epoch must be in [0, 2^32), received {epoch}")
    spec.check_control(control)
    words = _draw(spec, sequence_ids, seed=seed, epoch=epoch, stream=stream)
    num_pairs = spec.min_pairs + uniform_integers(
        words[_Purpose.COUNT][:, 0], spec.max_pairs - spec.min_pairs + 1
    )
    keys = spec.first_key + words[_Purpose.KEYS].argsort(dim=1, stable=True)
    values = spec.first_value + uniform_integers(words[_Purpose.VALUES], spec.num_values)
    if filler is None:
        filler = uniform_integers(words[_Purpose.NOISE], spec.num_noise)

    # slots of two tokens; the slot of rank r, in an order of chance, holds pair r, or query r
    pair_slots = words[_Purpose.PAIR_SLOTS].argsort(dim=1, stable=True)[:, : spec.max_pairs]
    query_slots = words[_Purpose.QUERY_SLOTS].argsort(dim=1, stable=True)[:, : spec.queries]
    stored = torch.arange(spec.max_pairs, device=filler.device) < num_pairs[:, None]
    # query r asks for pair r; a key beyond the last pair was never stored
    first = spec.max_pairs if control == "never_stored" else 0
    asked = slice(first, first + spec.queries)
    at_pair, at_query = 2 * pair_slots, spec.length - spec.query_span + 2 * query_slots

    tokens = filler
    for offset, written in ((0, keys), (1, values)):
        old = tokens.gather(1, at_pair + offset)
        tokens = tokens.scatter(1, at_pair + offset, written[:, : spec.max_pairs].where(stored, old))
        tokens = tokens.scatter(1, at_query + offset, written[:, asked])
    never = control == "never_stored"
    value_positions = torch.full_like(at_query, -1) if never else at_pair[:, : spec.queries] + 1
    behind = torch.arange(spec.length, device=filler.device) >= spec.pair_span
    segment_ids = behind.to(torch.int64) if control == "previous_shard" else torch.zeros_like(tokens[0])
    return RecallBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORED).scatter(1, at_query, values[:, asked]),
        segment_ids=segment_ids.expand_as(tokens),
        query_positions=at_query,
        value_positions=value_positions,
        num_pairs=num_pairs,
    )


def answer_distances(
    tokens: Int64[Tensor, "batch length"], labels: Int64[Tensor, "batch length"]
) -> Int64[Tensor, "batch length"]:
    """Tokens between each query and the value stored for its key; -1 where it has none, or none is asked.

    The queried key is looked for among the tokens before the query, and what follows its first occurrence is
    the value; keys must not occur in the filler.
    """
    length = tokens.shape[1]
    place = torch.arange(length, device=tokens.device)
    asked = labels != IGNORED
    first = torch.full_like(tokens, length)
    # by row, since a batch of all pairs of places would be length times as large as the batch
    for row, (read, wanted) in enumerate(zip(tokens, asked, strict=True)):
        queries = wanted.nonzero()[:, 0]
        same = read[queries, None] == read
        first[row, queries] = same.to(torch.int8).argmax(dim=1)
    distance = place - first - 1
    return torch.where(asked & (distance >= 0), distance, -1)


def _draw(
    spec: RecallSpec, sequence_ids: Tensor, *, seed: int, epoch: int, stream: Stream
) -> dict[_Purpose, Int64[Tensor, "batch _"]]:
    """Random words by purpose, one Philox call.

    The counter of four words is (block, sequence id, epoch, purpose and stream), the key is the seed.
    """
    elements = {
        _Purpose.COUNT: 1,
        _Purpose.PAIR_SLOTS: spec.pair_span // 2,
        _Purpose.KEYS: spec.num_keys,
        _Purpose.VALUES: spec.max_pairs + spec.queries,
        _Purpose.QUERY_SLOTS: spec.query_span // 2,
        _Purpose.NOISE: spec.length,
    }
    device = sequence_ids.device
    blocks = {purpose: -(-count // _WORDS_PER_BLOCK) for purpose, count in elements.items()}
    block_index = torch.cat([torch.arange(count, device=device) for count in blocks.values()])
    purposes = torch.cat(
        [
            torch.full((count,), purpose << _PURPOSE_SHIFT | STREAMS[stream], device=device)
            for purpose, count in blocks.items()
        ]
    )
    epochs = torch.full((1, 1), epoch, device=device)
    words = torch.stack(philox_4x32((block_index, sequence_ids[:, None], epochs, purposes), key=seed), -1)
    parts = words.split(list(blocks.values()), dim=1)
    return {
        purpose: part.flatten(1)[:, :count]
        for (purpose, count), part in zip(elements.items(), parts, strict=True)
    }
