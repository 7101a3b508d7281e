"""How a callable wants to be called is learnt from its names and outputs, and never guessed."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from theria.attention import registered_backend, scaled_dot_product_attention
from theria.curvature import Convention, ConventionError, as_backend
from theria.curvature.convention import find_convention


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, offset: int = 0) -> Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1 + offset), -math.inf)
    return scores.softmax(-1) @ value


def heads_first(query, key, value, is_causal=False):
    return softmax_attention(query, key, value, is_causal)


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return softmax_attention(q, k, v, causal, k.shape[2] - q.shape[2]).transpose(1, 2)


def tutorial(q, k, v, causal, sm_scale):
    assert sm_scale == q.shape[-1] ** -0.5
    return softmax_attention(q, k, v, causal)


def unnamed(q, k, v):
    return softmax_attention(q, k, v, causal=False).clone()


def unnamed_last(q, k, v):
    return flash(q, k, v)


def always_causal(q, k, v):
    return flash(q, k, v, causal=True), None


def whole_tiles(q, k, v):
    if q.shape[2] % 64:
        raise ValueError("lengths must be multiples of 64")
    return unnamed(q, k, v)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (heads_first, Convention("heads_first", "is_causal")),
        (torch_attention, Convention("heads_first", "is_causal", "scale")),
        (flash, Convention("heads_last", "causal", "softmax_scale", alignment="lower_right")),
        (tutorial, Convention("heads_first", "causal", "sm_scale")),
        (unnamed, Convention("heads_first")),
        (unnamed_last, Convention("heads_last")),
        (always_causal, Convention("heads_last", always_causal=True, alignment="lower_right")),
        (whole_tiles, Convention("heads_first")),
    ],
)
def test_names_and_outputs_tell_the_convention(function, expected):
    assert find_convention(function) == expected


@pytest.mark.parametrize("function", [heads_first, flash, tutorial, unnamed, unnamed_last])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bound_callable_is_attention_with_heads_first(function, causal):
    convention = find_convention(function)
    if not convention.can_mask(causal):
        assert convention.causal_argument is None
        return
    shapes = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    out = convention.bind(function)(*inputs, is_causal=causal)
    expected = scaled_dot_product_attention(
        *inputs, is_causal=causal, causal_alignment=convention.alignment, backend="reference"
    )
    torch.testing.assert_close(out, expected)


def test_a_wrong_output_leaves_the_names():
    def doubled(query, key, value, is_causal=False):
        return 2 * softmax_attention(query, key, value, is_causal)

    def doubled_flash(q, k, v, softmax_scale=None, causal=False):
        return 2 * flash(q, k, v, causal=causal)

    assert find_convention(doubled).layout == "heads_first"
    assert find_convention(doubled_flash).layout == "heads_last"


@pytest.mark.parametrize("names", ["q, k, v", "q, k, v, causal=False"])
def test_neither_outputs_nor_names_is_an_error_in_one_line_unless_the_layout_is_given(names):
    function = eval(f"lambda {names}: 3 * q")
    with pytest.raises(ConventionError, match=r"cannot tell the layout of <lambda>.*heads_last") as error:
        find_convention(function)
    assert "\n" not in str(error.value)
    assert find_convention(function, layout="heads_last").layout == "heads_last"


def test_two_names_for_the_mask_are_ambiguous():
    with pytest.raises(ConventionError, match="is_causal and causal, which is ambiguous"):
        find_convention(lambda q, k, v, causal=False, is_causal=False: q)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda q, k, v, bias: q, "also requires bias"),
        (lambda q, k, v, *, bias: q, "also requires bias"),
        (lambda q, k: q, r"its signature is \(q, k\)"),
    ],
)
def test_a_signature_that_is_not_attention_is_an_error(function, complaint):
    with pytest.raises(ConventionError, match=complaint):
        find_convention(function)


def test_a_callable_that_always_raises_is_left_to_the_audit():
    def refuses(q, k, v, causal=False):
        raise RuntimeError("not on this device")

    assert find_convention(refuses) == Convention("heads_first", "causal")


def test_a_callable_that_writes_into_its_inputs_does_not_mislead():
    def scales_in_place(q, k, v):
        return softmax_attention(q.mul_(2).clone() / 2, k, v, causal=False)

    assert find_convention(scales_in_place) == Convention("heads_first")


def test_an_output_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="must return a tensor"):
        Convention().bind(lambda q, k, v: [q])(*(torch.ones(1, 1, 2, 2) for _ in range(3)))


def test_as_a_backend_it_takes_masks_and_refuses_what_it_has_no_word_for():
    inputs = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    bare = partial(scaled_dot_product_attention, backend="reference")
    with registered_backend("bare", as_backend(bare)) as name:
        for causal in (False, True):
            found = scaled_dot_product_attention(*inputs, is_causal=causal, backend=name)
            torch.testing.assert_close(found, bare(*inputs, is_causal=causal))
        shared = [inputs[0], inputs[1][:, :1], inputs[2][:, :1]]
        for arguments, options in (
            (inputs, {"window": 2}),
            (inputs, {"scale": 1.0}),
            (shared, {"enable_gqa": True}),
        ):
            with pytest.raises(NotImplementedError, match="takes no window, shared heads or scale"):
                scaled_dot_product_attention(*arguments, backend=name, **options)
