import inspect

import pytest
import torch

from theria.attention.call import describe_call

DEFAULTS = {
    "is_causal": False,
    "window": None,
    "causal_alignment": "upper_left",
    "scale": None,
    "enable_gqa": False,
}


def describe(query, key, value, **options):
    return describe_call(query, key, value, **{**DEFAULTS, **options})


def unchecked(query, key, value, **options):
    """Without the type checks that the tests run under, which users do not have."""
    return inspect.unwrap(describe_call)(query, key, value, **{**DEFAULTS, **options})


def tensors(query, key, value, dtype=torch.float32):
    return tuple(torch.zeros(shape, dtype=dtype) for shape in (query, key, value))


def test_description_is_normalised():
    call = describe(*tensors((2, 4, 3, 16), (2, 2, 5, 16), (2, 2, 5, 7)), window=2, enable_gqa=True)
    assert call.is_causal
    assert call.scale == 0.25
    assert (call.query_shape, call.key_shape, call.value_shape) == (
        (2, 4, 3, 16),
        (2, 2, 5, 16),
        (2, 2, 5, 7),
    )
    assert (call.dtype, call.device) == (torch.float32, torch.device("cpu"))


def test_given_scale_stays():
    call = describe(*tensors((3, 4), (5, 4), (5, 6)), scale=2)
    assert call.scale == 2.0
    assert not call.is_causal


def test_description_reads_well():
    text = str(describe(*tensors((3, 4), (5, 4), (5, 6)), scale=0.5, window=3))
    assert text == (
        "query (3, 4), key (5, 4), value (5, 6), torch.float32 on cpu, is_causal=True, window=3, "
        "causal_alignment='upper_left', scale=0.5, enable_gqa=False"
    )


@pytest.mark.parametrize(
    "shapes", [((3, 4), (5, 4), (5, 6)), ((1, 1, 2, 3, 4), (1, 1, 2, 5, 4), (1, 1, 2, 5, 6))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_rank_and_every_dtype_pass(shapes, dtype):
    assert describe(*tensors(*shapes, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("shapes", "gqa", "message"),
    [
        (((4,), (4,), (4,)), False, r"rank of at least 2, \(\.\.\., length, width\), received query \(4,\)"),
        (((3, 4), (5, 4), (5, 4)), True, r"rank of at least 3, \(\.\.\., heads, length, width\)"),
        (((1, 3, 4), (5, 4), (5, 4)), False, "share one rank"),
        (((1, 3, 4), (1, 5, 4), (5, 4)), False, "share one rank"),
        (((3, 4), (5, 3), (5, 3)), False, "share a last dimension"),
        (((3, 0), (5, 0), (5, 3)), False, "last dimension of at least 1"),
        (((3, 4), (5, 4), (6, 4)), False, "key and value must agree"),
        (((2, 3, 4), (2, 5, 4), (1, 5, 4)), False, "key and value must agree"),
        (((1, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)), False, "nothing is broadcast"),
        (((1, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)), True, "before the heads"),
        (((1, 4, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)), False, "enable_gqa=True"),
        (((1, 3, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)), True, "multiple of the number of key-value heads"),
        (((1, 2, 3, 4), (1, 0, 5, 4), (1, 0, 5, 4)), True, "at least one query head"),
        (((1, 0, 3, 4), (1, 0, 5, 4), (1, 0, 5, 4)), True, "at least one query head"),
    ],
)
def test_shapes_that_are_no_attention_call(shapes, gqa, message):
    with pytest.raises(ValueError, match=message):
        describe(*tensors(*shapes), enable_gqa=gqa)


def test_shape_errors_say_what_was_received():
    with pytest.raises(ValueError, match=r"query \(3, 4\), key \(5, 3\) and value \(5, 2\)"):
        describe(*tensors((3, 4), (5, 3), (5, 2)))


def test_mixed_dtypes():
    query, key, value = tensors((3, 4), (5, 4), (5, 4))
    for mixed in ((query.double(), key, value), (query, key.double(), value), (query, key, value.double())):
        with pytest.raises(ValueError, match=r"one dtype, received .*float64"):
            describe(*mixed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_without_attention(dtype):
    with pytest.raises(ValueError, match=f"needs one of the dtypes torch.float32.* received {dtype}"):
        describe(*tensors((3, 4), (5, 4), (5, 4), dtype=dtype))


def test_mixed_devices():
    query, key, value = tensors((3, 4), (5, 4), (5, 4))
    for mixed in (
        (query.to("meta"), key, value),
        (query, key.to("meta"), value),
        (query, key, value.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"one device, received .*meta"):
            describe(*mixed)


@pytest.mark.parametrize("window", [0, -3])
def test_window_must_hold_a_key(window):
    with pytest.raises(ValueError, match=f"at least 1, got {window}"):
        describe(*tensors((3, 4), (5, 4), (5, 4)), window=window)


def test_window_is_not_a_flag():
    with pytest.raises(TypeError, match="integer or None, received True"):
        describe(*tensors((3, 4), (5, 4), (5, 4)), window=True)


def test_window_beyond_every_key_is_cut_to_what_it_sees():
    shapes = (3, 4), (5, 4), (5, 4)
    assert describe(*tensors(*shapes), window=2**70).window == 5
    assert describe(*tensors(*shapes[1:], shapes[1]), window=5).window == 5


def test_inputs_that_are_no_tensors():
    query, key, value = tensors((3, 4), (5, 4), (5, 4))
    with pytest.raises(TypeError, match="must be tensors, received Tensor, ndarray, Tensor"):
        unchecked(query, key.numpy(), value)


@pytest.mark.parametrize("flag", [1, "yes", None])
def test_is_causal_is_a_flag(flag):
    with pytest.raises(TypeError, match=f"is_causal must be a bool, received {flag!r}"):
        unchecked(*tensors((3, 4), (5, 4), (5, 4)), is_causal=flag)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_is_finite(scale):
    with pytest.raises(ValueError, match=f"scale must be finite, received {scale}"):
        describe(*tensors((3, 4), (5, 4), (5, 4)), scale=scale)


def test_unknown_alignment_even_without_a_mask():
    with pytest.raises(ValueError, match=r"'upper_left', 'lower_right'.*received 'lower_left'"):
        describe(*tensors((3, 4), (5, 4), (5, 4)), causal_alignment="lower_left")


def test_autocast_describes_the_dtype_of_the_computation():
    query, key, value = tensors((3, 4), (5, 4), (5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert describe(query, key.bfloat16(), value).dtype == torch.bfloat16
        assert describe(query.double(), key.double(), value.double()).dtype == torch.float64
        with pytest.raises(ValueError, match=r"needs one of the dtypes .* received torch.int32"):
            describe(query.int(), key.int(), value.int())
