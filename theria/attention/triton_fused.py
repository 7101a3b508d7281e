"""The attention operators as launches of Triton kernels: memory linear in length, float32 accumulation.

On CUDA devices, and on the CPU under Triton's interpreter (TRITON_INTERPRET=1 before theria is imported).
No launch adds to memory that another program writes, so two equal calls give equal bits.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from theria.attention.call import AttentionCall
from theria.attention.kernels import support
from theria.attention.kernels.common import Operand, Vector
from theria.attention.kernels.compilation import Job, Jobs, MakeJobs, compiled, on_device
from theria.attention.kernels.forward import forward_rows
from theria.attention.kernels.hvp import hvp_columns, hvp_rows
from theria.attention.kernels.jvp import jvp_rows
from theria.attention.kernels.second_jvp import second_jvp_rows
from theria.attention.kernels.tiles import arithmetic, tiles_for
from theria.attention.kernels.vjp import vjp_columns, vjp_rows
from theria.attention.operators import Band, Curvature, Gradients, Key, LogSumExp, Out, Query, Value

PRECISIONS = ("ieee", "fma", "bf16x6", "tf32x3", "tf32")

_KERNELS = {
    "forward_rows": forward_rows,
    "vjp_rows": vjp_rows,
    "vjp_columns": vjp_columns,
    "jvp_rows": jvp_rows,
    "hvp_rows": hvp_rows,
    "hvp_columns": hvp_columns,
    "second_jvp_rows": second_jvp_rows,
}

launches: Counter[str] = Counter()
"""How often each kernel has been launched in this process; ``launches.clear()`` starts over."""

Operands = Mapping[str, Sequence[Tensor | None]]
"""By kernel: the tensors that it reads and writes."""


def supports(call: AttentionCall) -> str | None:
    """Why the kernels cannot do a call, or None where they can."""
    return support.refusal(call.dtype, call.device, max(call.query_shape[-1], call.value_shape[-1]))


class TritonOperators:
    """`theria.attention.operators.AttentionOperators` as Triton kernels.

    Args:
        precision: how float32 products are taken. "ieee": every product of two finite numbers exact, and sums
            in float32, on the matrix units, which multiply the numbers' three parts of 8 bits, nine products
            in all (CUBLAS_COMPUTE_32F_EMULATED_16BFX9 of cuBLAS is the same idea). Errors are those of plain
            float32, not its bits: the units truncate within a tile's sum; an infinite factor gives NaN; of
            numbers below 2^-110 the last part is lost. Only Hopper's units find all parts in shared memory:
            other devices, tiles of less than 64 rows and widths above 128 take "fma", the fused multiply-adds
            of the ordinary units, several times slower. "bf16x6" leaves out the three least of the nine
            products, "tf32x3" takes two parts of 11 bits. "tf32" rounds the factors to 11 bits. Half
            precision ignores it.

    Raises:
        ValueError: for another precision, and, from the operators, for a dtype, device or width that the
            kernels do not compute.
    """

    def __init__(self, precision: str = "ieee") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, received {precision!r}")
        self.precision = precision

    def forward(self, query: Query, key: Key, value: Value, band: Band) -> tuple[Out, LogSumExp]:
        """O = P V and lse."""
        qkv = query, key, value
        support.check(qkv)
        out, lse = _empty(query, value.shape[-1], torch.float32), _empty_rows(query)
        operands = {"forward_rows": (*qkv, out, lse)}
        if any(t.requires_grad for t in qkv):
            first, second = _derivatives(query, key, value, out, lse)
            self._launch(query, value, band, operands, following=first, later=second)
        else:
            self._launch(query, value, band, operands)
        return out, lse

    def vjp(
        self, query: Query, key: Key, value: Value, out: Out, lse: LogSumExp, cotangent: Out, band: Band
    ) -> Gradients:
        """Gradient of <dO, O>."""
        qkv = query, key, value
        support.check((*qkv, cotangent), saved=(out, lse))
        grads = Gradients(*(_empty(t, t.shape[-1]) for t in qkv))
        constants = [_empty_rows(query) for _ in range(2)]
        operands = _vjp_operands(*qkv, out, lse, cotangent, grads, constants)
        self._launch(query, value, band, operands)
        return grads

    def jvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        tangents: Gradients,
        band: Band,
    ) -> Out:
        """Derivative of O along the tangents."""
        support.check((query, key, value, *tangents), saved=(out, lse))
        derivative = _empty(query, value.shape[-1])
        without_cotangent = (None,) * 5
        rows = (query, key, value, out, lse, *tangents, derivative, *without_cotangent)
        self._launch(query, value, band, {"jvp_rows": rows})
        return derivative

    def hvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        cotangent: Out,
        cotangents: Gradients,
        band: Band,
    ) -> Curvature:
        """Gradient of <a, dQ> + <b, dK> + <c, dV>."""
        qkv = query, key, value
        support.check((*qkv, cotangent, *cotangents), saved=(out, lse))
        curvature = Curvature(*(_empty(t, t.shape[-1]) for t in (*qkv, cotangent)))
        constants = [_empty_rows(query) for _ in range(4)]
        operands = _hvp_operands(*qkv, out, lse, cotangent, cotangents, curvature, constants)
        self._launch(query, value, band, operands)
        return curvature

    def second_jvp(
        self,
        query: Query,
        key: Key,
        value: Value,
        out: Out,
        lse: LogSumExp,
        tangents: Gradients,
        others: Gradients,
        band: Band,
    ) -> Out:
        """Second derivative of O along the tangents and the others."""
        support.check((query, key, value, *tangents, *others), saved=(out, lse))
        derivative = _empty(query, value.shape[-1])
        rows = (query, key, value, out, lse, *tangents, *others, derivative)
        self._launch(query, value, band, {"second_jvp_rows": rows})
        return derivative

    def _launch(
        self,
        query: Tensor,
        value: Tensor,
        band: Band,
        operands: Operands,
        following: Callable[[], Operands] | None = None,
        later: Callable[[], Operands] | None = None,
    ) -> None:
        """Run the named kernels on their operands, one after the other; compile others, see ``compiled``."""
        jobs = self._jobs(query, value, band, operands)
        with on_device(query.device):
            if query.is_cuda and jobs and not support.INTERPRETED:
                compiled(
                    jobs,
                    query.dtype,
                    query.device,
                    following=self._maker(query, value, band, following),
                    later=self._maker(query, value, band, later),
                )
            for name, job in jobs.items():
                launches[name] += 1
                job.kernel[job.grid](*job.arguments, **job.constants)

    def _maker(
        self, query: Tensor, value: Tensor, band: Band, operands: Callable[[], Operands] | None
    ) -> MakeJobs | None:
        return None if operands is None else lambda: self._jobs(query, value, band, operands())

    def _jobs(self, query: Tensor, value: Tensor, band: Band, operands: Operands) -> Jobs:
        """Launches of the named kernels, without those that have nothing to do."""
        jobs = {}
        for name, tensors in operands.items():
            programs, constants = self._grid(name, query, value, band)
            if programs > 0:
                arguments = (*_arguments(tensors), *_sizes(name, query, value, band))
                jobs[name] = Job(_KERNELS[name], (programs,), arguments, constants)
        return jobs

    def _grid(self, name: str, query: Tensor, value: Tensor, band: Band) -> tuple[int, dict[str, Any]]:
        """How many programs a kernel takes, and its constants."""
        batch, heads, queries, dim = query.shape
        _, kv_heads, keys, value_dim = value.shape
        width = max(dim, value_dim)
        precision = arithmetic(self.precision, query.device)
        tiles = tiles_for(name, query.dtype, precision, width, query.device).within(queries, keys)
        length, tile, owners = (
            (keys, tiles.keys, kv_heads) if name.endswith("_columns") else (queries, tiles.queries, heads)
        )
        return triton.cdiv(length, tile) * batch * owners, {
            "SHARING": heads // kv_heads,
            "CAUSAL": band.causal,
            "WINDOWED": band.window is not None,
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
            "BLOCK_VALUE_DIM": max(16, triton.next_power_of_2(value_dim)),
            "BLOCK_QUERIES": tiles.queries,
            "BLOCK_KEYS": tiles.keys,
            "PRECISION": precision,
            # float32 products take long to compile, and beside them a mask costs nothing
            "PASSES": 1 if query.dtype == torch.float32 else 2,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }


def _arguments(tensors: Sequence[Tensor | None]) -> Iterator[Operand | Vector | None]:
    for tensor in tensors:
        if tensor is None:
            yield None
        else:
            yield Operand.of(tensor) if tensor.dim() == 4 else Vector.of(tensor)


def _sizes(name: str, query: Tensor, value: Tensor, band: Band) -> tuple[float, int, int, int, int, int]:
    """Scale, queries, keys, offset, window, and the heads whose tiles a kernel's programs own."""
    queries, keys = query.shape[2], value.shape[2]
    # a window wider than the band sees what no window sees, and must fit an int32
    window = min(band.window or 0, queries + keys + abs(band.offset))
    heads = value.shape[1] if name.endswith("_columns") else query.shape[1]
    return band.scale, queries, keys, band.offset, window, heads


def _vjp_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cotangent: Tensor,
    grads: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> dict[str, tuple[Tensor, ...]]:
    """What the kernels of ``vjp`` read and write."""
    qkv = query, key, value
    return {
        "vjp_rows": (*qkv, out, lse, cotangent, grads[0], *constants),
        "vjp_columns": (*qkv, lse, cotangent, *constants, *grads[1:]),
    }


def _hvp_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cotangent: Tensor,
    cotangents: Sequence[Tensor],
    curvature: Curvature,
    constants: Sequence[Tensor],
) -> dict[str, tuple[Tensor, ...]]:
    """What the kernels of ``hvp`` read and write."""
    qkv = query, key, value
    given = (*qkv, lse, cotangent, *cotangents, *constants)
    return {
        "jvp_rows": (*qkv, out, lse, *cotangents, curvature.out_cotangent, cotangent, *constants),
        "hvp_rows": (*given, curvature.query),
        "hvp_columns": (*given, curvature.key, curvature.value),
    }


def _derivatives(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Callable[[], Operands], Callable[[], Operands]]:
    """Operands of ``vjp`` and of ``hvp`` that have shapes alone, to compile for."""

    # no tensors of the call: they would live until all is compiled
    def alike(*tensors: Tensor) -> list[Tensor]:
        return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]

    # made when they are asked for: most calls find all compiled
    def first() -> Operands:
        q, k, v, o, rows = alike(query, key, value, out, lse)
        cotangent = o.to(q.dtype)
        return _vjp_operands(q, k, v, o, rows, cotangent, alike(q, k, v), [rows] * 2)

    def second() -> Operands:
        q, k, v, o, rows = alike(query, key, value, out, lse)
        cotangent = o.to(q.dtype)
        curvature = Curvature(*alike(q, k, v, cotangent))
        return _hvp_operands(q, k, v, o, rows, cotangent, alike(q, k, v), curvature, [rows] * 4)

    return first, second


def _empty(like: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output over the rows of ``like``; a kernel writes every element of it."""
    return torch.empty(*like.shape[:-1], width, dtype=dtype or like.dtype, device=like.device)


def _empty_rows(query: Tensor) -> Tensor:
    """One float32 a query."""
    return torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
