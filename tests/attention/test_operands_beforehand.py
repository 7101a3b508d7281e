"""What is compiled beforehand is described without the tensors of the call, and only if it is asked for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from theria.attention import available_backends

if "triton_fused" not in available_backends():
    pytest.skip("Triton is not installed", allow_module_level=True)

from theria.attention.operators import Band
from theria.attention.triton_fused import TritonOperators, _derivatives


class Devices(TorchDispatchMode):
    """Notes the devices on which tensors are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.made.append(out.device.type)
        return out


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(1, 2, length, 8, dtype=dtype, requires_grad=True) for length in (3, 5, 5)]


def test_a_forward_that_trains_makes_no_tensors_but_its_own() -> None:
    query, key, value = inputs()
    with Devices() as devices:
        TritonOperators().forward(query, key, value, Band(1.0))
    assert devices.made
    assert "meta" not in devices.made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_of_both_orders_have_shapes_alone(dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype)
    out, lse = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3)
    first, second = (of() for of in _derivatives(query, key, value, out, lse))
    assert set(first) == {"vjp_rows", "vjp_columns"}
    assert set(second) == {"jvp_rows", "hvp_rows", "hvp_columns"}
    for operands in (first, second):
        for tensors in operands.values():
            assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert [tuple(t.shape) for t in first["vjp_rows"][:3]] == [(1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8)]
    # the cotangent is of the inputs' dtype, the forward's own results are not
    assert [t.dtype for t in first["vjp_rows"][3:6]] == [torch.float32, torch.float32, dtype]
