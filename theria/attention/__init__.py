"""Scaled dot-product attention whose derivatives of every order are exact, over exchangeable backends.

Callers use ``scaled_dot_product_attention`` alone. A backend is one function (the protocol
``AttentionBackend``), registered here under a name, and may say through its ``supports`` which calls it
cannot do. ``reference`` is the specification that every other backend is tested against.
"""

from importlib.util import find_spec

from theria.attention.api import recorded_backends, resolve_backend, scaled_dot_product_attention
from theria.attention.call import AttentionCall
from theria.attention.custom import CustomOperators
from theria.attention.fused import backend_over
from theria.attention.reference import reference_attention
from theria.attention.registry import (
    AttentionBackend,
    available_backends,
    check_backend_name,
    register_backend,
    registered_backend,
)

register_backend("reference", reference_attention)
register_backend("custom", backend_over(CustomOperators()))

# Triton is published for Linux alone
if find_spec("triton") is not None:
    from theria.attention.triton_fused import TritonOperators, supports

    register_backend(
        "triton_fused",
        backend_over(TritonOperators()),
        supports=supports,
        # on the CPU it is an interpreter: for tests, never by itself
        automatic=lambda call: call.device.type == "cuda",
    )

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "available_backends",
    "backend_over",
    "check_backend_name",
    "recorded_backends",
    "register_backend",
    "registered_backend",
    "resolve_backend",
    "scaled_dot_product_attention",
]
