import pytest
import torch

from theria.attention.call import AttentionCall
from theria.attention.registry import (
    available_backends,
    backend_function,
    check_backend_name,
    register_backend,
    registered_backend,
    select_backend,
)

pytestmark = pytest.mark.usefixtures("only_reference")

CALL = AttentionCall(
    query_shape=(3, 4),
    key_shape=(5, 4),
    value_shape=(5, 6),
    dtype=torch.float64,
    device=torch.device("cpu"),
    is_causal=False,
    window=None,
    causal_alignment="upper_left",
    scale=0.5,
    enable_gqa=False,
)


def nothing(query, key, value, **call):
    return value


def only_float32(call):
    return None if call.dtype == torch.float32 else f"it supports torch.float32, not {call.dtype}"


def test_registered_backends_are_available_in_order():
    register_backend("second", nothing)
    register_backend("third", nothing)
    assert available_backends() == ("reference", "second", "third")
    assert select_backend(CALL, "third") == "third"
    assert backend_function("third") is nothing


def test_a_name_is_not_taken_twice_unless_replaced():
    register_backend("mine", nothing)
    with pytest.raises(ValueError, match="'mine' is registered already; pass replace=True"):
        register_backend("mine", lambda query, key, value, **call: query)
    assert backend_function("mine") is nothing

    def other(query, key, value, **call):
        return query

    register_backend("mine", other, replace=True)
    assert backend_function("mine") is other


@pytest.mark.parametrize("name", ["auto", ""])
def test_reserved_names(name):
    with pytest.raises(ValueError, match=f"received {name!r}"):
        register_backend(name, nothing, replace=True)


def test_temporary_backend_is_gone_after_the_block():
    with registered_backend("temporary", nothing) as name:
        assert name in available_backends()
    assert available_backends() == ("reference",)


def test_temporary_replacement_is_undone_after_an_error():
    original = backend_function("reference")

    def fail_inside():
        with registered_backend("reference", nothing, supports=only_float32, replace=True):
            assert backend_function("reference") is nothing
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert backend_function("reference") is original
    assert select_backend(CALL, "reference") == "reference"


def test_temporary_backend_does_not_replace_by_accident():
    with pytest.raises(ValueError, match="registered already"), registered_backend("reference", nothing):
        pass
    assert backend_function("reference") is not nothing


def test_a_named_backend_that_cannot_do_the_call_says_so():
    register_backend("narrow", nothing, supports=only_float32)
    assert select_backend(CALL._replace(dtype=torch.float32), "narrow") == "narrow"
    with pytest.raises(NotImplementedError) as raised:
        select_backend(CALL, "narrow")
    message = str(raised.value)
    assert "'narrow' cannot do this call: it supports torch.float32, not torch.float64" in message
    assert f"Received {CALL}" in message


def test_auto_takes_the_fused_backend_where_it_can():
    assert select_backend(CALL, "auto") == "reference"
    register_backend("triton_fused", nothing, supports=only_float32)
    assert select_backend(CALL._replace(dtype=torch.float32), "auto") == "triton_fused"
    assert select_backend(CALL, "auto") == "reference"


def test_auto_leaves_the_fused_backend_what_is_not_automatic():
    register_backend("triton_fused", nothing, automatic=lambda call: call.dtype == torch.float32)
    assert select_backend(CALL._replace(dtype=torch.float32), "auto") == "triton_fused"
    assert select_backend(CALL, "auto") == "reference"
    assert select_backend(CALL, "triton_fused") == "triton_fused"


def test_auto_takes_no_other_backend():
    register_backend("custom", nothing)
    register_backend("mine", nothing)
    assert select_backend(CALL, "auto") == "reference"


def test_auto_without_any_usable_backend_is_an_error():
    register_backend("reference", nothing, supports=only_float32, replace=True)
    with pytest.raises(NotImplementedError, match="'reference' cannot do this call"):
        select_backend(CALL, "auto")


@pytest.mark.parametrize("check", [check_backend_name, lambda name: select_backend(CALL, name)])
def test_unavailable_and_unknown_names(check):
    for name in ("custom", "triton_fused"):
        with pytest.raises(
            NotImplementedError, match=f"'{name}' is not available in this build; .*reference, auto"
        ):
            check(name)
    with pytest.raises(
        ValueError, match="unknown attention backend 'flash'; available here: reference, auto"
    ):
        check("flash")
    check("auto")
    check("reference")
