"""Counter-based random numbers: word number n of a stream is a function of n, with no state to carry along.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
128-bit counter and a 64-bit key into four 32-bit words. Words are held in int64 tensors, where the product of
two 32-bit numbers keeps all its bits; everything is elementwise, so a word does not depend on the batch, the
device or the number of threads it is computed in.
"""

import math

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

WORD_BITS = 32
WORD_MASK = 2**WORD_BITS - 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: int) -> Words:
    """Four random words for every counter: ten rounds of Philox, bit-equal on every device.

    A round multiplies the words c0 and c2 by constants, (hi, lo) = M c, and mixes
    c0, c1, c2, c3 <- hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0).

    Args:
        counter: four int64 tensors with values in [0, 2^32), of shapes that broadcast with one another.
        key: 64 bits; its low half is the first key word of the paper, its high half the second.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).

    Raises:
        ValueError: the key does not fit 64 bits.
    """
    if not 0 <= key < 2 ** (2 * WORD_BITS):
        raise ValueError(f"a Philox key is an integer in [0, 2^64), got {key}")
    # In-place rounds on six buffers: fresh tensors each round cost twice the time, in page faults.
    c0, c1, c2, c3 = (word.clone() for word in torch.broadcast_tensors(*counter))
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for round_index in range(_ROUNDS):
        key0, key1 = (
            (half + round_index * increment) & WORD_MASK
            for half, increment in zip((key & WORD_MASK, key >> WORD_BITS), _KEY_INCREMENTS, strict=True)
        )
        torch.mul(c0, _MULTIPLIERS[0], out=product0)
        torch.mul(c2, _MULTIPLIERS[1], out=product1)
        # The mask also clears what the arithmetic shift and the unmasked c1, c3 leave above 32 bits.
        torch.bitwise_right_shift(product1, WORD_BITS, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(WORD_MASK)
        torch.bitwise_right_shift(product0, WORD_BITS, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(WORD_MASK)
        c1, product1 = product1, c1
        c3, product0 = product0, c3
    return c0, c1.bitwise_and_(WORD_MASK), c2, c3.bitwise_and_(WORD_MASK)


def uniform_integers(words: Int64[Tensor, "*shape"], bound: int) -> Int64[Tensor, "*shape"]:
    """Integers in [0, bound) from words: floor(word * bound / 2^32).

    Multiply-shift without rejection: the probability of a value is off 1 / bound by less than 2^-32.

    Raises:
        ValueError: bound is outside [1, 2^31].
    """
    if not 1 <= bound <= 2**31:
        raise ValueError(f"the bound of uniform integers must be in [1, 2^31], got {bound}")
    return (words * bound) >> WORD_BITS


def normal_pairs(
    words_a: Int64[Tensor, "*shape"], words_b: Int64[Tensor, "*shape"]
) -> tuple[Float32[Tensor, "*shape"], Float32[Tensor, "*shape"]]:
    """Two independent standard normals from two words, by Box and Muller (1958) in float32.

    r = sqrt(-2 ln u), (z0, z1) = (r cos a, r sin a), with u = (word_a + 1/2) / 2^32 and
    a = 2 pi word_b / 2^32. The largest value is 6.76; u near 1 has the steps of float32, so the radii next to
    0 are multiples of about 3e-4. The logarithm and the circular functions are the device's own: CPU and CUDA
    agree within float32 rounding, not bit for bit.
    """
    radius = words_a.to(torch.float32).mul_(2.0**-WORD_BITS).add_(2.0 ** -(WORD_BITS + 1))
    radius.log_().mul_(-2.0).sqrt_()
    angle = words_b.to(torch.float32).mul_(2.0 * math.pi * 2.0**-WORD_BITS)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)
