import logging

import pytest
import torch
import torch.nn.functional as F

from theria.attention import (
    api,
    available_backends,
    recorded_backends,
    registered_backend,
    resolve_backend,
    scaled_dot_product_attention,
)
from theria.attention.reference import reference_attention
from theria.attention.registry import backend_function


def tensors(query=(2, 3, 4), key=(2, 5, 4), value=(2, 5, 6), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in (query, key, value)
    )


@pytest.fixture
def recorded():
    """A backend that records what it is called with."""
    calls = []

    def record(query, key, value, **call):
        calls.append((query, key, value, call))
        return torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)

    with registered_backend("recorder", record):
        yield calls


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"is_causal": True, "enable_gqa": True}],
)
def test_agrees_with_torch_where_torch_has_it(options):
    heads = 4 if options.get("enable_gqa") else 2
    inputs = tensors((3, heads, 5, 4), (3, 2, 7, 4), (3, 2, 7, 6), torch.float64)
    torch.testing.assert_close(
        scaled_dot_product_attention(*inputs, **options), F.scaled_dot_product_attention(*inputs, **options)
    )


def test_what_took_the_calls_is_recorded_by_block(recorded):
    inputs = tensors()
    with recorded_backends() as outer:
        scaled_dot_product_attention(*inputs)
        with recorded_backends() as inner:
            scaled_dot_product_attention(*inputs, backend="recorder")
            scaled_dot_product_attention(*inputs, backend="recorder")
        scaled_dot_product_attention(*inputs, backend="custom")
    scaled_dot_product_attention(*inputs, backend="recorder")
    assert outer == {"reference", "recorder", "custom"}
    assert inner == {"recorder"}
    with pytest.raises(NotImplementedError, match="attn_mask"), recorded_backends() as refused:
        scaled_dot_product_attention(*inputs, attn_mask=inputs[0])
    assert refused == set()
    assert not api._records


def test_backend_receives_a_normalised_call(recorded):
    query, key, value = tensors()
    out = scaled_dot_product_attention(query, key, value, window=2, backend="recorder")
    assert out.shape == (2, 3, 6)
    seen = recorded[0]
    assert (seen[0] is query, seen[1] is key, seen[2] is value) == (True, True, True)
    assert seen[3] == {
        "is_causal": True,
        "window": 2,
        "causal_alignment": "upper_left",
        "scale": 0.5,
        "enable_gqa": False,
    }


def test_backend_receives_what_the_caller_asks(recorded):
    scaled_dot_product_attention(
        *tensors((4, 3, 4)),
        causal_alignment="lower_right",
        is_causal=True,
        scale=2,
        enable_gqa=True,
        backend="recorder",
    )
    assert recorded[0][3] == {
        "is_causal": True,
        "window": None,
        "causal_alignment": "lower_right",
        "scale": 2.0,
        "enable_gqa": True,
    }


def test_a_variant_may_wrap_another_backend():
    def halved(query, key, value, **call):
        return 0.5 * scaled_dot_product_attention(query, key, value, **call, backend="reference")

    inputs = tensors()
    options = {"window": 2, "causal_alignment": "lower_right", "scale": 0.7}
    with registered_backend("halved", halved):
        out = scaled_dot_product_attention(*inputs, **options, backend="halved")
    torch.testing.assert_close(out, 0.5 * scaled_dot_product_attention(*inputs, **options))


@pytest.mark.usefixtures("only_reference")
def test_resolution_follows_the_call():
    def float32_square(call):
        square = call.query_shape[-2] == call.key_shape[-2]
        return None if call.dtype == torch.float32 and square else "it supports square float32"

    square = tensors(key=(2, 3, 4), value=(2, 3, 6))
    with registered_backend("triton_fused", lambda query, key, value, **call: value, supports=float32_square):
        assert resolve_backend(*square) == "triton_fused"
        assert resolve_backend(*square, backend="reference") == "reference"
        assert resolve_backend(*(x.double() for x in square)) == "reference"
        assert resolve_backend(*tensors()) == "reference"
        with pytest.raises(NotImplementedError, match="square float32"):
            resolve_backend(*tensors(), backend="triton_fused")
        assert scaled_dot_product_attention(*square) is square[2]
    assert resolve_backend(*square) == "reference"


@pytest.mark.parametrize("function", [scaled_dot_product_attention, resolve_backend])
def test_both_entries_refuse_the_same_calls(function):
    query, key, value = tensors()
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        function(query, key, value, backend="flash")
    with pytest.raises(ValueError, match="one dtype"):
        function(query.double(), key, value)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        function(query, key, value, window=0)
    with pytest.raises(ValueError, match="causal_alignment must be one of"):
        function(query, key, value, causal_alignment="bottom")
    with pytest.raises(ValueError, match="share one rank"):
        function(query[0], key, value)


@pytest.mark.usefixtures("only_reference")
def test_choice_of_auto_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(api, "_logged_choices", set())
    caplog.set_level(logging.INFO, logger="theria.attention.api")
    inputs = tensors()
    resolve_backend(*inputs)
    scaled_dot_product_attention(*inputs, backend="reference")
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        scaled_dot_product_attention(*inputs)
    assert caplog.records == []
    for _ in range(3):
        scaled_dot_product_attention(*inputs)
    assert [
        (record.levelname, "'auto' takes 'reference'" in record.getMessage()) for record in caplog.records
    ] == [("INFO", True)]


def test_autocast_lowers_the_inputs_and_stays_outside_the_backend(recorded):
    query, key, value = tensors()
    lowered = [x.bfloat16() for x in (query, key, value)]
    expected = scaled_dot_product_attention(*lowered, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scaled_dot_product_attention(query, lowered[1], value, backend="reference")
        double = scaled_dot_product_attention(
            query.double(), key.double(), value.double(), backend="reference"
        )
        scaled_dot_product_attention(query, key, value, backend="recorder")
    assert torch.equal(out, expected)
    assert double.dtype == torch.float64
    assert {x.dtype for x in recorded[0][:3]} == {torch.bfloat16}


def test_meta_tensors_give_shapes():
    inputs = [x.to("meta") for x in tensors()]
    assert scaled_dot_product_attention(*inputs, window=2, backend="reference").shape == (2, 3, 6)


def test_package_registers_reference():
    assert "reference" in available_backends()
    assert backend_function("reference") is reference_attention


@pytest.mark.parametrize("asked", [{"attn_mask": torch.ones(2, 2)}, {"dropout_p": 0.1}])
def test_a_mask_or_dropout_is_refused_with_what_there_is(asked):
    (name,) = asked
    q = torch.randn(2, 4)
    with pytest.raises(
        NotImplementedError, match=f"no backend takes {name}.*is_causal, causal_alignment and window"
    ):
        scaled_dot_product_attention(q, q, q, **asked)
    without = scaled_dot_product_attention(q, q, q, attn_mask=None, dropout_p=0.0)
    assert torch.equal(without, scaled_dot_product_attention(q, q, q))
