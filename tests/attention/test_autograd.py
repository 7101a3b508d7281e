"""The chain of autograd functions: every way to every derivative against the explicit softmax, in numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from theria.attention import scaled_dot_product_attention
from theria.attention.autograd import differentiable_attention
from theria.attention.custom import CustomOperators
from theria.attention.operators import Band

OPERATORS = CustomOperators()
Inputs = tuple[Tensor, Tensor, Tensor]
AttentionOf = Callable[[Tensor, Tensor, Tensor], Tensor]

CASES = {
    "full": ((2, 2, 2, 5, 7, 4, 3), {}),
    "causal, grouped": ((1, 4, 2, 5, 5, 4, 3), {"is_causal": True}),
    "window, one shared head": ((2, 2, 1, 7, 4, 3, 5), {"is_causal": True, "window": 2}),
    "dead rows": ((1, 2, 2, 6, 3, 3, 3), {"is_causal": True, "causal_alignment": "lower_right"}),
}


class Case:
    """Inputs, tangents and the two attentions to compare."""

    def __init__(self, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
        batch, heads, kv_heads, queries, keys, dim, value_dim = sizes
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.inputs = (
            draw(batch, heads, queries, dim),
            draw(batch, kv_heads, keys, dim),
            draw(batch, kv_heads, keys, value_dim),
        )
        self.tangents = tuple(draw(*x.shape) for x in self.inputs)
        self.weight = draw(batch, heads, queries, value_dim)
        self.others = tuple(draw(*x.shape) for x in self.inputs)
        call = {
            "scale": dim**-0.5,
            "is_causal": False,
            "window": None,
            "causal_alignment": "upper_left",
        } | options
        band = Band.of_call(queries=queries, keys=keys, **call)
        self.chain: AttentionOf = lambda q, k, v: differentiable_attention(q, k, v, OPERATORS, band)[0]
        self.reference: AttentionOf = lambda q, k, v: scaled_dot_product_attention(
            q, k, v, enable_gqa=heads != kv_heads, backend="reference", **call
        )

    def loss(self, attention: AttentionOf) -> Callable[..., Tensor]:
        """A scalar that is nonlinear in the output, so that its curvature mixes everything."""
        return lambda *inputs: (attention(*inputs).sin() * self.weight).sum()

    def gradients(self, function: Callable[..., Tensor]) -> Callable[..., Any]:
        return grad(function, argnums=(0, 1, 2))

    def along(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: jvp(function, inputs, self.tangents)[1]

    def along_both(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Along the tangents, then along others."""
        return lambda *inputs: jvp(self.along(function), inputs, self.others)[1]


def total(values: Any) -> Tensor:
    return torch.stack([leaf.sin().sum() for leaf in tree_leaves(values)]).sum()


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*CASES[request.param])


def stacked(inputs: Inputs) -> Inputs:
    return tuple(torch.stack([x, 1.1 * x, x - 0.2]) for x in inputs)


def reverse_over_reverse(order: int) -> Callable[[Case, AttentionOf], Any]:
    def compute(case: Case, attention: AttentionOf) -> Any:
        inputs = [x.clone().requires_grad_() for x in case.inputs]
        value, found = case.loss(attention)(*inputs), []
        for _ in range(order):
            gradients = torch.autograd.grad(value, inputs, create_graph=True)
            found += [g.detach() for g in gradients]
            value = sum(((g * g.cos() * t).sum() for g, t in zip(gradients, case.tangents, strict=True)))
        return found

    return compute


def functional_hvp(case: Case, attention: AttentionOf) -> Any:
    return torch.autograd.functional.hvp(case.loss(attention), case.inputs, case.tangents)


def dual_numbers_over_backward(case: Case, attention: AttentionOf) -> Any:
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.clone().requires_grad_(), t)
            for x, t in zip(case.inputs, case.tangents, strict=True)
        ]
        gradients = torch.autograd.grad(case.loss(attention)(*duals), duals)
        return [forward_ad.unpack_dual(g).tangent for g in gradients]


def through_checkpoint(case: Case, attention: AttentionOf) -> Any:
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    value = checkpoint(case.loss(attention), *inputs, use_reentrant=False)
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    return gradients, torch.autograd.grad(total(gradients), inputs)


def non_contiguous(case: Case, attention: AttentionOf) -> Any:
    """Inputs read through other strides, and a query expanded along the batch."""
    inputs = [x.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in case.inputs]
    query = inputs[0][:1].detach().requires_grad_()
    value = case.loss(attention)(query.expand_as(inputs[0]), *inputs[1:])
    gradients = torch.autograd.grad(value, [query, *inputs[1:]], create_graph=True)
    return gradients, torch.autograd.grad(total(gradients), [query, *inputs[1:]])


def by_one_input_each(
    case: Case, attention: AttentionOf, one: int, other: int, tangents: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Forward mode by one input, then by another, each along its tangent, the rest held."""
    first, second = tangents or (case.tangents[one], case.others[other])

    def at(values: dict[int, Tensor]) -> tuple[Tensor, ...]:
        return tuple(values.get(i, x) for i, x in enumerate(case.inputs))

    def once(moved: Tensor) -> Tensor:
        values = at({other: moved})
        return jvp(lambda x: attention(*values[:one], x, *values[one + 1 :]), (values[one],), (first,))[1]

    return jvp(once, (case.inputs[other],), (second,))[1]


def along_moving(case: Case, attention: AttentionOf) -> AttentionOf:
    """Along tangents that depend on the inputs, then along others."""

    def once(*inputs: Tensor) -> Tensor:
        moving = tuple(t * x.sin() for t, x in zip(case.tangents, inputs, strict=True))
        return jvp(attention, inputs, moving)[1]

    return lambda *inputs: jvp(once, inputs, case.others)[1]


COMPOSITIONS: dict[str, Callable[[Case, AttentionOf], Any]] = {
    "value": lambda c, f: f(*c.inputs),
    "reverse": reverse_over_reverse(1),
    "reverse twice": reverse_over_reverse(2),
    "reverse three times": reverse_over_reverse(3),
    "functional.hvp": functional_hvp,
    "dual numbers over backward": dual_numbers_over_backward,
    "checkpoint": through_checkpoint,
    "non-contiguous and expanded": non_contiguous,
    "jvp": lambda c, f: c.along(f)(*c.inputs),
    "jvp(grad)": lambda c, f: c.along(c.gradients(c.loss(f)))(*c.inputs),
    "grad(jvp)": lambda c, f: c.gradients(lambda *x: total(c.along(f)(*x)))(*c.inputs),
    "grad(grad)": lambda c, f: c.gradients(lambda *x: total(c.gradients(c.loss(f))(*x)))(*c.inputs),
    "jvp(jvp)": lambda c, f: c.along(c.along(f))(*c.inputs),
    "jvp(jvp) along two tangents": lambda c, f: c.along_both(f)(*c.inputs),
    "jvp(jvp) of the query alone": lambda c, f: by_one_input_each(c, f, 0, 0),
    "jvp(jvp) of the key alone": lambda c, f: by_one_input_each(c, f, 1, 1),
    "jvp(jvp) of the query, then of the key": lambda c, f: by_one_input_each(c, f, 0, 1),
    "jvp(jvp) of the value, then of the query": lambda c, f: by_one_input_each(c, f, 2, 0),
    "jvp(jvp) along tangents that move": lambda c, f: along_moving(c, f)(*c.inputs),
    "jvp(jvp(jvp)) along tangents that move": lambda c, f: c.along(along_moving(c, f))(*c.inputs),
    "jvp(jvp) by the tangents alone": lambda c, f: jvp(
        lambda *t: jvp(f, c.inputs, t)[1], c.tangents, c.others
    )[1],
    "jvp(jvp) of a chord": lambda c, f: c.along_both(lambda *x: f(*(y + y.sin() ** 2 for y in x)).cos())(
        *c.inputs
    ),
    "vmap(jvp(jvp)) over tangents": lambda c, f: vmap(
        lambda a, b: by_one_input_each(c, f, 0, 1, tangents=(a, b)), in_dims=(0, 1)
    )(torch.stack([c.tangents[0], c.others[0]]), torch.stack([c.others[1], c.tangents[1]], 1)),
    "grad(jvp(jvp)) along two tangents": lambda c, f: c.gradients(lambda *x: total(c.along_both(f)(*x)))(
        *c.inputs
    ),
    "grad(jvp(jvp)) by the tangents": lambda c, f: grad(
        lambda t, s: total(jvp(lambda *x: jvp(f, x, t)[1], c.inputs, s)[1]), argnums=(0, 1)
    )(c.tangents, c.others),
    "jvp(jvp(jvp)) by turns": lambda c, f: c.along_both(c.along(f))(*c.inputs),
    "grad(grad(jvp(jvp)))": lambda c, f: c.gradients(
        lambda *x: total(c.gradients(lambda *y: total(c.along_both(f)(*y)))(*x))
    )(*c.inputs),
    "grad(jvp(grad))": lambda c, f: c.gradients(lambda *x: total(c.along(c.gradients(c.loss(f)))(*x)))(
        *c.inputs
    ),
    "grad(jvp(jvp))": lambda c, f: c.gradients(lambda *x: total(c.along(c.along(f))(*x)))(*c.inputs),
    "jvp(jvp(grad))": lambda c, f: c.along(c.along(c.gradients(c.loss(f))))(*c.inputs),
    "jvp(jvp(jvp))": lambda c, f: c.along(c.along(c.along(f)))(*c.inputs),
    "jvp(jvp(jvp(grad)))": lambda c, f: c.along(c.along(c.along(c.gradients(c.loss(f)))))(*c.inputs),
    "vmap(grad(grad))": lambda c, f: vmap(
        c.gradients(lambda *x: total(c.gradients(c.loss(f))(*x))), in_dims=(0, None, 0)
    )(stacked(c.inputs)[0], c.inputs[1], stacked(c.inputs)[2]),
    "vmap(jvp(grad))": lambda c, f: vmap(c.along(c.gradients(c.loss(f))))(*stacked(c.inputs)),
    "vmap(vmap(grad))": lambda c, f: vmap(
        vmap(c.gradients(c.loss(f)), in_dims=(0, 0, 1)), in_dims=(None, 0, None)
    )(
        stacked(c.inputs)[0],
        torch.stack([stacked(c.inputs)[1], 2 * stacked(c.inputs)[1]]),
        stacked(c.inputs)[2].movedim(0, 1),
    ),
    "vmap(grad) over a dimension in the middle": lambda c, f: vmap(c.gradients(c.loss(f)), in_dims=(2, 1, 3))(
        *(x.movedim(0, d) for x, d in zip(stacked(c.inputs), (2, 1, 3), strict=True))
    ),
    "jvp(jvp(vmap)) of a shared key": lambda c, f: c.along(
        c.along(lambda q, k, v: vmap(lambda a, b: f(a, k, b))(q.unsqueeze(0), v.unsqueeze(0)))
    )(*c.inputs),
    "jvp(jvp) of an expanded query": lambda c, f: c.along(
        c.along(lambda q, k, v: f(q[:1, :1].expand_as(q), k, v))
    )(*c.inputs),
    "grad(grad(vmap))": lambda c, f: c.gradients(
        lambda *x: total(
            c.gradients(lambda *y: (vmap(f, in_dims=(0, 0, None))(*y).sin() * c.weight).sum())(*x)
        )
    )(*stacked(c.inputs)[:2], c.inputs[2]),
}


@pytest.mark.parametrize("composition", list(COMPOSITIONS))
def test_every_composition_equals_the_explicit_softmax(case, composition):
    compute = COMPOSITIONS[composition]
    found = tree_leaves(compute(case, case.chain))
    expected = tree_leaves(compute(case, case.reference))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_a_map_over_nothing_gives_nothing(case):
    """No task at all: empty results of the right shapes, through the second derivative."""
    query, _, value = (torch.empty(0, *x.shape, dtype=x.dtype) for x in case.inputs)
    second = case.gradients(lambda *x: total(case.gradients(case.loss(case.chain))(*x)))
    assert vmap(case.chain, in_dims=(0, None, 0))(query, case.inputs[1], value).shape == (
        0,
        *case.weight.shape,
    )
    for found, x in zip(
        vmap(second, in_dims=(0, None, 0))(query, case.inputs[1], value), case.inputs, strict=True
    ):
        assert found.shape == (0, *x.shape)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_inputs_that_need_no_gradient_are_left_out(case, wanted):
    def second_order(attention: AttentionOf) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(case.inputs)]
        leaves = [inputs[i] for i in wanted]
        gradients = torch.autograd.grad(case.loss(attention)(*inputs), leaves, create_graph=True)
        return [*gradients, *torch.autograd.grad(total(gradients), leaves)]

    for a, b in zip(second_order(case.chain), second_order(case.reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_gradient_used_in_part_meets_missing_cotangents(case):
    """Only dV is differentiated again, so the cotangents of dQ and dK are None."""

    def second_order(attention: AttentionOf) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in case.inputs]
        gradients = torch.autograd.grad(case.loss(attention)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(gradients[2].sin().sum(), inputs)

    for a, b in zip(second_order(case.chain), second_order(case.reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("of_leaves", [True, False])
@pytest.mark.parametrize("wanted", range(7))
def test_the_second_derivative_is_differentiated_by_each_operand_alone(case, wanted, of_leaves):
    """By query, key, value, the cotangent, and the cotangents of the gradients, which it is linear in."""

    def third_order(attention: AttentionOf) -> Tensor:
        drawn = (*case.inputs, case.weight, *case.tangents)
        given = [x.clone().requires_grad_() for x in drawn]
        *inputs, cotangent, a, b, c = given if of_leaves else [1.5 * x for x in given]
        first = torch.autograd.grad(attention(*inputs), inputs, cotangent, create_graph=True)
        second = torch.autograd.grad(first, (*inputs, cotangent), (a, b, c), create_graph=True)
        return torch.autograd.grad(total(second), given[wanted])[0]

    found, expected = third_order(case.chain), third_order(case.reference)
    assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_a_jvp_whose_cotangent_is_missing_has_no_gradient(case):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> None:
            return None

    inputs = [x.clone().requires_grad_() for x in case.inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, case.tangents, strict=True)]
        moved = forward_ad.unpack_dual(case.chain(*duals)).tangent
        found = torch.autograd.grad(Cut.apply(moved).sum() + inputs[0].sum(), inputs, allow_unused=True)
    assert torch.equal(found[0], torch.ones_like(inputs[0]))
    assert found[1:] == (None, None)


def test_finite_differences_agree_in_both_orders(case):
    inputs = tuple(x.clone().requires_grad_() for x in case.inputs)
    assert torch.autograd.gradcheck(case.chain, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.chain, inputs, check_fwd_over_rev=True, fast_mode=True)
    step = 1e-5
    ahead, behind = (
        case.along(case.chain)(*(x + h * t for x, t in zip(case.inputs, case.others, strict=True)))
        for h in (step, -step)
    )
    found = case.along_both(case.chain)(*case.inputs)
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


def test_derivatives_taken_inside_autocast_keep_their_own_precision(case):
    """Scores large enough that a softmax whose scores are rounded to bfloat16 would not sum to one."""

    def gradients(attention: AttentionOf, autocast: bool) -> tuple[Tensor, ...]:
        inputs = [8 * x.float().requires_grad_() for x in case.inputs]
        with torch.autocast("cpu", enabled=autocast):
            value = (attention(*inputs) * case.weight.float()).sum()
            first = torch.autograd.grad(value, inputs, create_graph=True)
            second = torch.autograd.grad(total(first), inputs, create_graph=True)
            third = torch.autograd.grad(total(second), inputs)
            leaves = tuple(x.detach() for x in inputs)
            moving = [tuple(t.float() for t in group) for group in (case.tangents, case.others)]
            forward = [jvp(lambda *x: jvp(attention, x, moving[0])[1], leaves, moving[1])[1]]
            forward += case.gradients(
                lambda *y: total(jvp(lambda *x: jvp(attention, x, moving[0])[1], y, moving[1])[1])
            )(*leaves)
            return *first, *second, *third, *forward

    for a, b in zip(gradients(case.chain, True), gradients(case.chain, False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_lse_is_not_differentiable(case):
    inputs = tuple(x.clone().requires_grad_() for x in case.inputs)
    band = Band(scale=1.0)
    out, lse = differentiable_attention(*inputs, OPERATORS, band)
    assert out.requires_grad
    assert not lse.requires_grad


class DirectLaunch(torch.autograd.Function):
    """What a kernel author may write: a backward that launches a kernel and leaves no graph."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, band: Band) -> Any:
        return OPERATORS.forward(query, key, value, band)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.band = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> Any:
        with torch.no_grad():
            return *OPERATORS.vjp(*ctx.saved_tensors, cotangent, ctx.band), None


def test_the_check_of_this_file_fails_on_a_backward_without_a_graph():
    case = Case(*CASES["full"])
    band = Band(scale=case.inputs[0].shape[-1] ** -0.5)
    broken: AttentionOf = lambda q, k, v: DirectLaunch.apply(q, k, v, band)[0]  # noqa: E731 - as in Case
    case.chain = broken
    test_every_composition_equals_the_explicit_softmax(case, "reverse")
    with pytest.raises((AssertionError, RuntimeError)):
        test_every_composition_equals_the_explicit_softmax(case, "reverse twice")
