import pytest
import torch

from theria.attention.masks import visible_keys


def drawn(queries, keys, **options):
    mask = visible_keys(queries, keys, **{"window": None, "offset": 0, **options})
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


@pytest.mark.parametrize(
    ("queries", "keys", "options", "expected"),
    [
        (3, 3, {}, ["x..", "xx.", "xxx"]),
        (2, 4, {}, ["x...", "xx.."]),
        (2, 4, {"offset": 2}, ["xxx.", "xxxx"]),
        (4, 2, {}, ["x.", "xx", "xx", "xx"]),
        (4, 2, {"offset": -2}, ["..", "..", "x.", "xx"]),
        (4, 4, {"window": 2}, ["x...", "xx..", ".xx.", "..xx"]),
        (3, 3, {"window": 1}, ["x..", ".x.", "..x"]),
        (2, 5, {"window": 2, "offset": 3}, ["..xx.", "...xx"]),
        (5, 2, {"window": 2}, ["x.", "xx", ".x", "..", ".."]),
        (3, 3, {"window": 99}, ["x..", "xx.", "xxx"]),
    ],
)
def test_mask_as_drawn(queries, keys, options, expected):
    assert drawn(queries, keys, **options) == expected


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sides_give_empty_masks(queries, keys):
    mask = visible_keys(queries, keys, window=2, offset=keys - queries)
    assert mask.shape == (queries, keys)
    assert mask.dtype == torch.bool
