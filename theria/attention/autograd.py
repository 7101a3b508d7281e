"""One chain of autograd functions that makes any operator set differentiable, exactly, to any order.

    function            of                    backward                    jvp
    Attention           q, k, v               AttentionVJP                AttentionJVP
    AttentionVJP        q, k, v, dO           AttentionHVP                AttentionHVP + AttentionVJP
    AttentionJVP        q, k, v, a, b, c      AttentionHVP, AttentionVJP  AttentionSecondJVP + AttentionJVP
    AttentionHVP        q, k, v, dO, a, b, c  formulas of ``custom``      formulas of ``custom``
    the same            a, b, c alone         AttentionHVP, AttentionVJP
    AttentionSecondJVP  q, k, v, a, ..., c'   formulas of ``custom``      formulas of ``custom``

Every derivative up to the second is therefore a launch of an operator, whichever way it is taken: reverse
over reverse, forward over reverse, reverse over forward or forward over forward. lse and O, unrounded, travel
with q, k and v so that no operator computes them twice; to autograd they are constants, because each
function's derivative already is the total one by q, k and v. What is differentiated once more than the
operators reach recomputes them from q, k and v.

A function that launched its backward's kernels directly would return gradients without a graph, and
``create_graph=True`` would be answered by first-order gradients without a word.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from theria.attention import custom
from theria.attention.operators import AttentionOperators, Band, Gradients, Key, LogSumExp, Out, Query, Value


def differentiable_attention(
    query: Query, key: Key, value: Value, operators: AttentionOperators, band: Band
) -> tuple[Out, LogSumExp]:
    """O and lse of attention over ``operators``, differentiable in O by query, key and value.

    Works under ``backward``, ``torch.autograd`` with ``create_graph``, forward mode, and ``torch.func``'s
    grad, jvp and vmap in any nesting.
    """
    out, lse, _ = Attention.apply(query, key, value, operators, band)
    return out, lse


class _Operator(Function):
    """What the five functions share: the trailing (operators, band), and batching by stacking batches."""

    @classmethod
    def batched(cls, info: Any, in_dims: tuple[int | None, ...], args: Sequence[Any]) -> Any:
        """Fold the mapped dimension of every tensor into its batch dimension, apply, and unfold."""
        size = info.batch_size
        tensors = [_fold(t, dim, size) for t, dim in zip(args[:-2], in_dims[:-2], strict=True)]
        outputs = cls.apply(*tensors, *args[-2:])
        batches = size, _batch(args[0], in_dims[0])
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, batches), 0
        return tuple(t.unflatten(0, batches) for t in outputs), (0,) * len(outputs)


class Attention(_Operator):
    """(q, k, v) -> (O, lse, O before it was rounded); only the first is differentiable."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, operators: AttentionOperators, band: Band) -> Any:
        with _own_precision(query):
            exact, lse = operators.forward(query, key, value, band)
        if exact.dtype == query.dtype:
            return exact, lse, exact.new_empty(len(exact), 0)
        return exact.to(query.dtype), lse, exact

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        query, key, value, ctx.operators, ctx.band = inputs
        out, lse, exact = output
        ctx.mark_non_differentiable(lse, exact)
        # where nothing was rounded the third output is empty
        saved = query, key, value, exact if exact.dim() == out.dim() else out, lse
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> Any:
        return (
            *AttentionVJP.apply(*_constant_tail(ctx.saved_tensors), cotangent, ctx.operators, ctx.band),
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        saved = _constant_tail(ctx.saved_tensors)
        moved = _materialise(tangents[:3], saved[:3])
        return AttentionJVP.apply(*saved, *moved, ctx.operators, ctx.band), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return Attention.batched(info, in_dims, args)


class AttentionVJP(_Operator):
    """(q, k, v, out, lse, dO) -> (dQ, dK, dV)."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, operators, band = args
        with _own_precision(tensors[0]):
            return tuple(operators.vjp(*tensors, band))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.operators, ctx.band = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        *grads, grad_cotangent = AttentionHVP.apply(*ctx.saved_tensors, *cotangents, ctx.operators, ctx.band)
        return *grads, None, None, grad_cotangent, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *primals, cotangent = ctx.saved_tensors
        moved = _materialise((*tangents[:3], tangents[5]), (*primals[:3], cotangent))
        tail = (ctx.operators, ctx.band)
        curved = AttentionHVP.apply(*primals, cotangent, *moved[:3], *tail)[:3]
        linear = AttentionVJP.apply(*primals, moved[3], *tail)
        return tuple(Formula.apply(torch.add, a, b) for a, b in zip(curved, linear, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return AttentionVJP.batched(info, in_dims, args)


class AttentionJVP(_Operator):
    """(q, k, v, out, lse, a, b, c) -> U."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, operators, band = args
        with _own_precision(tensors[0]):
            return operators.jvp(*tensors[:5], Gradients(*tensors[5:]), band)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.operators, ctx.band = inputs
        ctx.set_materialize_grads(False)  # what has no tangent costs no launch
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        if cotangent is None:
            return (None,) * 10
        primals, moved = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        tail = (ctx.operators, ctx.band)
        curved = AttentionHVP.apply(*primals, cotangent, *moved, *tail)[:3]
        linear = AttentionVJP.apply(*primals, cotangent, *tail)
        return *curved, None, None, *linear, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        primals, moved = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        tail = (ctx.operators, ctx.band)
        parts = []
        if _any(tangents[:3]):
            others = _materialise(tangents[:3], primals[:3])
            parts.append(AttentionSecondJVP.apply(*primals, *moved, *others, *tail))
        if _any(tangents[5:8]):
            parts.append(AttentionJVP.apply(*primals, *_materialise(tangents[5:8], moved), *tail))
        return parts[0] if len(parts) == 1 else Formula.apply(torch.add, *parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return AttentionJVP.batched(info, in_dims, args)


class AttentionHVP(_Operator):
    """(q, k, v, out, lse, dO, a, b, c) -> (gQ, gK, gV, gdO)."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, operators, band = args
        with _own_precision(tensors[0]):
            return tuple(operators.hvp(*tensors[:6], Gradients(*tensors[6:]), band))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.operators, ctx.band = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        primals, cotangent, tangents = ctx.saved_tensors[:5], ctx.saved_tensors[5], ctx.saved_tensors[6:]
        if not _awaited(ctx, (0, 1, 2, 5)):
            # by a, b and c it is linear and symmetric: still a second derivative, as functional.hvp takes it
            tail = (ctx.operators, ctx.band)
            curved = AttentionHVP.apply(*primals, cotangent, *cotangents[:3], *tail)[:3]
            linear = AttentionVJP.apply(*primals, cotangents[3], *tail)
            return (None,) * 6 + tuple(a + b for a, b in zip(curved, linear, strict=True)) + (None, None)
        with _own_precision(cotangents[0]):
            pull = torch.func.vjp(_hvp_from_scratch(ctx.band), *primals[:3], cotangent, *tangents)[1]
            query, key, value, *rest = pull(cotangents)
        return query, key, value, None, None, *rest, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        saved = (*ctx.saved_tensors[:3], *ctx.saved_tensors[5:])
        directions = _materialise((*tangents[:3], *tangents[5:9]), saved)
        return _pushforward(_hvp_from_scratch(ctx.band), saved, directions)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return AttentionHVP.batched(info, in_dims, args)


class AttentionSecondJVP(_Operator):
    """(q, k, v, out, lse, a, b, c, a', b', c') -> D²O."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, operators, band = args
        with _own_precision(tensors[0]):
            return operators.second_jvp(*tensors[:5], Gradients(*tensors[5:8]), Gradients(*tensors[8:]), band)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        query, key, value, _, _, *rest, _, ctx.band = inputs
        ctx.save_for_backward(query, key, value, *rest)
        ctx.save_for_forward(query, key, value, *rest)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        with _own_precision(cotangent):
            pull = torch.func.vjp(_second_jvp_from_scratch(ctx.band), *ctx.saved_tensors)[1]
            query, key, value, *rest = pull(cotangent)
        return query, key, value, None, None, *rest, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        directions = _materialise((*tangents[:3], *tangents[5:11]), ctx.saved_tensors)
        return _pushforward(_second_jvp_from_scratch(ctx.band), ctx.saved_tensors, directions)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return AttentionSecondJVP.batched(info, in_dims, args)


class Formula(Function):
    """(function, *tensors) -> function(*tensors), for a function made of tensor operations.

    While it runs a Function's ``jvp``, torch switches forward mode off for tensor operations, for all
    nested levels, so that a third nested jvp would come out zero; but it follows a Function. A jvp that
    needs tensor operations therefore wraps them in this one, whose own ``jvp`` is again of its kind.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor) -> Any:
        with _own_precision(tensors[0]):
            return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        with _own_precision(cotangents[0]):
            output, pull = torch.func.vjp(ctx.function, *ctx.saved_tensors)[:2]
            return None, *pull(cotangents[0] if isinstance(output, Tensor) else cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> Any:
        return _pushforward(ctx.function, ctx.saved_tensors, _materialise(tangents, ctx.saved_tensors))


def _pushforward(
    function: Callable[..., Any], primals: Sequence[Tensor], directions: Sequence[Tensor]
) -> Any:
    """The derivative of ``function`` at ``primals`` along ``directions``, itself differentiable."""
    count = len(primals)
    # torch.func.jvp writes its tangents in place, which an expanded tensor refuses
    primals, directions = [t.contiguous() for t in primals], [t.contiguous() for t in directions]

    def derivative(*tensors: Tensor) -> Any:
        return torch.func.jvp(function, tensors[:count], tensors[count:])[1]

    return Formula.apply(derivative, *primals, *directions)


def _second_jvp_from_scratch(band: Band) -> Callable[..., Tensor]:
    """D²O as a function of tensors alone."""

    def compute(query: Tensor, key: Tensor, value: Tensor, *tangents: Tensor) -> Tensor:
        one, other = Gradients(*tangents[:3]), Gradients(*tangents[3:])
        return custom.second_jvp_formula(query, key, value, one, other, band)

    return compute


def _hvp_from_scratch(band: Band) -> Callable[..., tuple[Tensor, ...]]:
    """The curvature as a function of tensors alone."""

    def compute(
        query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor, *cotangents: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(custom.hvp_formula(query, key, value, cotangent, Gradients(*cotangents), band))

    return compute


def _awaited(ctx: Any, positions: Sequence[int]) -> bool:
    """Whether the backward that runs goes on from the tensor inputs at these positions."""
    nodes = (ctx.next_functions[i][0] for i in positions)
    # what torch.autograd.graph.register_multi_grad_hook asks; of a leaf, a node without successors, the
    # engine refuses to say
    return any(
        node is not None and (not node.next_functions or torch._C._will_engine_execute_node(node))
        for node in nodes
    )


def _own_precision(tensor: Tensor) -> torch.autocast:
    """Keep autocast out: derivatives are taken inside of it too, and in its precision they do not cancel."""
    return torch.autocast(tensor.device.type, enabled=False)


def _constant_tail(saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """q, k and v as they are; out and lse cut from whatever graph they hang on."""
    query, key, value, out, lse = saved
    return query, key, value, out.detach(), lse.detach()


def _any(tangents: Sequence[Tensor | None]) -> bool:
    return any(t is not None for t in tangents)


def _materialise(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, like, strict=True)]


def _batch(tensor: Tensor, dim: int | None) -> int:
    """The batch beside the mapped dimension; not to be inferred where nothing is mapped over."""
    return next(size for i, size in enumerate(tensor.shape) if i != dim)


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    if dim is None:
        return tensor.unsqueeze(0).expand(size, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)
