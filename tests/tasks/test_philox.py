"""Philox against its published vectors and against integers of unlimited size; normals against float64."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from theria.tasks.philox import normal_pairs, philox_4x32, uniform_integers

WORD = 2**32


def philox_in_python(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key % WORD, key // WORD
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, WORD)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def as_tensors(counter: tuple[int, int, int, int]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(word) for word in counter)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            0,
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            0xFFFFFFFFFFFFFFFF,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_published_vectors(
    counter: tuple[int, int, int, int], key: int, expected: tuple[int, int, int, int]
) -> None:
    assert tuple(int(word) for word in philox_4x32(as_tensors(counter), key)) == expected


def test_broadcast_counters_against_unlimited_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = 5, 7
    c0 = torch.randint(WORD, (columns,), generator=generator)
    c1 = torch.randint(WORD, (rows, 1), generator=generator)
    c2 = torch.tensor([[WORD - 1]])
    c3 = torch.randint(WORD, (columns,), generator=generator)
    key = 0xDEADBEEF01234567
    words = philox_4x32((c0, c1, c2, c3), key)
    for row in range(rows):
        for column in range(columns):
            counter = (int(c0[column]), int(c1[row, 0]), WORD - 1, int(c3[column]))
            assert tuple(int(word[row, column]) for word in words) == philox_in_python(counter, key)


def test_counters_are_left_as_they_were() -> None:
    counter = tuple(torch.arange(8) for _ in range(4))
    philox_4x32(counter, 1)
    assert all(torch.equal(word, torch.arange(8)) for word in counter)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_a_key_of_more_than_64_bits_is_refused(key: int) -> None:
    with pytest.raises(ValueError, match=str(key)):
        philox_4x32(as_tensors((0, 0, 0, 0)), key)


def test_uniform_integers_cut_the_words_into_equal_parts() -> None:
    bound = 5
    words = torch.tensor([0, 858993459, 858993460, WORD // 2, WORD - 1])
    assert uniform_integers(words, bound).tolist() == [int(word) * bound // WORD for word in words]
    assert uniform_integers(words, bound).tolist() == [0, 0, 1, 2, 4]
    assert uniform_integers(torch.tensor([WORD - 1]), 2**31).item() == 2**31 - 1


@pytest.mark.parametrize("bound", [0, 2**31 + 1])
def test_impossible_bounds_are_refused(bound: int) -> None:
    with pytest.raises(ValueError, match=str(bound)):
        uniform_integers(torch.tensor([0]), bound)


def test_normal_pairs_against_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    words_a = torch.cat([torch.tensor([0, 1, WORD - 1]), torch.randint(WORD, (1000,), generator=generator)])
    words_b = torch.cat([torch.tensor([WORD - 1, 0, 7]), torch.randint(WORD, (1000,), generator=generator)])
    z0, z1 = normal_pairs(words_a, words_b)
    for a, b, first, second in zip(words_a.tolist(), words_b.tolist(), z0.tolist(), z1.tolist(), strict=True):
        # u in float32 has steps of 6e-8 near 1, which a radius near 0 feels; the rest is exact to rounding.
        uniform = np.float32(a) * np.float32(2**-32) + np.float32(2**-33)
        radius = math.sqrt(-2 * math.log(uniform.item()))
        angle = 2 * math.pi * b / WORD
        assert first == pytest.approx(radius * math.cos(angle), abs=4e-6)
        assert second == pytest.approx(radius * math.sin(angle), abs=4e-6)
    assert z0[0].item() == pytest.approx(6.76, abs=0.01)


def test_normal_pairs_are_normal_and_uncorrelated() -> None:
    counter = (torch.arange(50_000), torch.tensor(0), torch.tensor(0), torch.tensor(0))
    words = philox_4x32(counter, 2)
    z0, z1 = normal_pairs(words[0], words[1])
    for z in (z0, z1):
        assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 0.01
    standard_error = len(z0) ** -0.5
    assert abs(torch.corrcoef(torch.stack([z0, z1]))[0, 1]) < 3 * standard_error
    assert abs(torch.corrcoef(torch.stack([z0.square(), z1.square()]))[0, 1]) < 3 * standard_error
