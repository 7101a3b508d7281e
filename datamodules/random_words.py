"""Random words for what a data module decides, and numbers below a bound from them."""

from enum import IntEnum

import torch
from jaxtyping import Int64
from torch import Tensor

from theria.tasks.philox import WORD_BITS, WORD_MASK, philox_4x32
from theria.tasks.synthetic_seqcls import STREAMS, Stream

WORDS_PER_BLOCK = 4

_PURPOSE_SHIFT = 8


class Purpose(IntEnum):
    """What a random word is for; numbers that no other stream of words uses."""

    WINDOW_ORDER = 128
    WINDOW_PHASE = 129
    BATCH_ORDER = 130
    FILLER = 131


def random_words(
    seed: int, purpose: Purpose, stream: Stream, ids: Int64[Tensor, "ids 1"], epoch: int, blocks: int
) -> Int64[Tensor, "ids words"]:
    """Random words of each id: the counter is (block, id, epoch, purpose and stream), the key is the seed."""
    counter = (
        torch.arange(blocks),
        ids & WORD_MASK,
        torch.tensor(epoch & WORD_MASK),
        torch.tensor(purpose << _PURPOSE_SHIFT | STREAMS[stream]),
    )
    return torch.stack(philox_4x32(counter, key=seed), dim=-1).flatten(1)


def scaled(high: int, low: int, bound: int) -> int:
    """A number in [0, bound) from two random words."""
    return ((high << WORD_BITS | low) * bound) >> (2 * WORD_BITS)
