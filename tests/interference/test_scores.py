"""Scores against loops over pairs, heads and entries in float64, and the laws they obey."""

import itertools
import math

import numpy as np
import pytest
import torch
from families import (
    HUGGING_FACE,
    OURS,
    autograd_gradients,
    build,
    family,
    head_gradient,
    loss_of,
    samples,
)

from theria.interference import VARIANTS, Ridge, collect, compute, score, score_matrices

ALL = (*HUGGING_FACE, *OURS)
RIDGES = (
    Ridge("relative", 1e-2),
    Ridge("absolute", 1e-4),
    Ridge("floor", 1e-4),
    Ridge("conditional", 1e-3),
    Ridge("relative", 0),
)


def divided_by(ridge, entry, mean):
    """The divisor of one entry of I, by the seed's equations."""
    value = ridge.value
    if ridge.kind == "relative":
        return entry + value * mean
    if ridge.kind == "absolute":
        return max(entry, value / 100) + value
    if ridge.kind == "floor":
        return max(entry, value)
    return entry + value if entry < value / 10 else entry


def is_clamped(ridge, entry):
    """Whether an entry lies below the ridge's threshold, by the seed's equations."""
    below = {
        "relative": 0,
        "absolute": ridge.value / 100,
        "floor": ridge.value,
        "conditional": ridge.value / 10,
    }
    return entry < below[ridge.kind]


def by_loops(name, gradients_a, gradients_b, fisher, ridge):
    """Every score and diagnostic of a family, one pair, head and parameter entry after the other."""
    owned = family(name).owned
    fishers = {}
    for key, slices in owned.items():
        squares = [[head_gradient(slices, g).square() for g in task] for task in (gradients_a, gradients_b)]
        mean_a, mean_b = (sum(task) / len(task) for task in squares)
        count_a, count_b = len(squares[0]), len(squares[1])
        fishers[key] = {
            "a": mean_a,
            "pooled": (mean_a + mean_b) / 2,
            "pooled_n": (count_a * mean_a + count_b * mean_b) / (count_a + count_b),
        }[fisher]
    found = {}
    for (layer, block, head), slices in owned.items():
        of_block = torch.cat([f for (other, b, _), f in fishers.items() if (other, b) == (layer, block)])
        information = fishers[layer, block, head].tolist()
        divisors = [divided_by(ridge, entry, float(of_block.mean())) for entry in information]
        raised = [d - entry > entry for d, entry in zip(divisors, information, strict=True)]
        found["ridge_share", layer, block, head] = sum(raised) / len(raised)
        clamped = [is_clamped(ridge, entry) for entry in information]
        found["clamped_share", layer, block, head] = sum(clamped) / len(clamped)
        for i, j in itertools.product(range(len(gradients_a)), range(len(gradients_b))):
            g_i = head_gradient(slices, gradients_a[i]).tolist()
            g_j = head_gradient(slices, gradients_b[j]).tolist()
            totals = dict.fromkeys(VARIANTS, 0.0)
            for x, y, entry, divisor in zip(g_i, g_j, information, divisors, strict=True):
                if entry == 0:
                    continue
                totals["directional"] += x * x / divisor * abs(y)
                totals["signed"] += x * y / divisor
                totals["symmetric"] += abs(x) * abs(y) / divisor
            for variant, total in totals.items():
                found[variant, i, j, layer, block, head] = total
    return found


def assert_equal_loops(result, expected, rtol=1e-9):
    for (quantity, *place), value in expected.items():
        if quantity in ("ridge_share", "clamped_share"):
            layer, block, head = place
            assert getattr(result.diagnostics[block], quantity)[layer, head] == pytest.approx(value)
            continue
        i, j, layer, block, head = place
        # a signed sum is as exact as its terms are large
        scale = expected["symmetric", i, j, layer, block, head]
        found = result.scores[quantity][block][i, j, layer, head]
        assert abs(found - value) <= rtol * (abs(value) + scale), (quantity, place)


@pytest.mark.parametrize("name", ALL)
def test_equal_loops_over_pairs_heads_and_entries(name):
    model, loss = build(name), loss_of(name)
    drawn_a, drawn_b = samples(name, 3, seed=1), samples(name, 2, seed=2)
    expected = by_loops(
        name,
        autograd_gradients(model, loss, drawn_a),
        autograd_gradients(model, loss, drawn_b),
        "a",
        RIDGES[0],
    )
    result = compute(model, loss, drawn_a, drawn_b, ridge=RIDGES[0], min_samples_for_fisher=1)
    assert_equal_loops(result, expected)
    widths = {block: array.shape for block, array in result.scores["signed"].items()}
    found = family(name)
    layers = 1 if name.startswith("seq") else 2
    assert widths == {
        block: (3, 2, layers, found.heads if block in "QO" else found.kv_heads) for block in result.blocks
    }
    assert result.blocks == ("QKV" if name.startswith("seq") else "QKVO")


@pytest.mark.parametrize("ridge", RIDGES, ids=lambda ridge: f"{ridge.kind}-{ridge.value}")
@pytest.mark.parametrize("fisher", ["a", "pooled", "pooled_n"])
def test_every_fisher_and_ridge_equals_loops(fisher, ridge):
    model, loss = build("qwen3"), loss_of("qwen3")
    drawn_a, drawn_b = samples("qwen3", 3, seed=1), samples("qwen3", 2, seed=2)
    expected = by_loops(
        "qwen3",
        autograd_gradients(model, loss, drawn_a),
        autograd_gradients(model, loss, drawn_b),
        fisher,
        ridge,
    )
    result = compute(model, loss, drawn_a, drawn_b, fisher=fisher, ridge=ridge, min_samples_for_fisher=1)
    assert_equal_loops(result, expected)
    assert (result.fisher, result.ridge) == (fisher, ridge)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
@pytest.mark.parametrize("ridge", RIDGES[:4], ids=lambda ridge: ridge.kind)
def test_distinct_heads_add_up_to_the_block(name, ridge):
    model = build(name)
    gradients = collect(model, loss_of(name), samples(name, 7))
    options = {"ridge": ridge, "min_samples_for_fisher": 1, "fisher": "pooled"}
    by_head = score(gradients, range(4), range(4, 7), **options)
    whole = score(gradients, range(4), range(4, 7), per_head=False, **options)
    for variant, block in itertools.product(VARIANTS, "QKVO"):
        assert whole.heads[block] == ("all",)
        total = by_head.scores[variant][block].sum(axis=-1, keepdims=True)
        scale = np.abs(by_head.scores["symmetric"][block]).sum(axis=-1, keepdims=True)
        assert (np.abs(whole.scores[variant][block] - total) <= 1e-12 * scale).all()
        here, there = whole.diagnostics[block], by_head.diagnostics[block]
        np.testing.assert_array_equal(here.slice_size[..., 0], there.slice_size.sum(axis=-1))
        np.testing.assert_allclose(here.gradient_l1_a[..., 0], there.gradient_l1_a.sum(axis=-1))


def tensors(heads=3, entries=17, a=5, b=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    g_a, g_b = (torch.randn(n, heads, entries, generator=generator).double() for n in (a, b))
    return g_a, g_b, g_a.square().mean(dim=0)


def test_scale_laws():
    g_a, g_b, fisher = tensors()
    plain = score_matrices(g_a, g_b, fisher, ridge=0.0)
    stretched = score_matrices(3 * g_a, g_b, 9 * fisher, ridge=0.0)
    torch.testing.assert_close(stretched["directional"], plain["directional"])
    torch.testing.assert_close(stretched["signed"], plain["signed"] / 3)
    torch.testing.assert_close(stretched["symmetric"], plain["symmetric"] / 3)
    for variant, found in score_matrices(g_a, 5 * g_b, fisher, ridge=0.0).items():
        torch.testing.assert_close(found, 5 * plain[variant])


def test_scale_laws_of_whole_computations():
    model, loss = build("gpt2"), loss_of("gpt2")
    drawn_a, drawn_b = samples("gpt2", 4, seed=1), samples("gpt2", 3, seed=2)
    options = {"min_samples_for_fisher": 1}
    plain = compute(model, loss, drawn_a, drawn_b, **options)
    a, b = ([(task, factor) for task in tasks] for tasks, factor in ((drawn_a, 3.0), (drawn_b, 5.0)))
    scaled = compute(model, lambda m, s: s[1] * loss(m, s[0]), a, b, **options)
    for block in "QKVO":
        scale = plain.scores["symmetric"][block].max()
        for variant, factor in (("directional", 5), ("signed", 5 / 3), ("symmetric", 5 / 3)):
            np.testing.assert_allclose(
                scaled.scores[variant][block],
                factor * plain.scores[variant][block],
                rtol=1e-8,
                atol=1e-10 * scale,
            )


def test_the_bias_of_keys_is_rounding_that_a_relative_ridge_keeps_out():
    # all keys of a head moved alike change no softmax, so that what is found there is rounding
    model, loss = build("gpt2"), loss_of("gpt2")
    drawn_a, drawn_b = samples("gpt2", 4, seed=1), samples("gpt2", 3, seed=2)
    of_weight, of_bias = family("gpt2").owned[0, "K", 0]
    for found in autograd_gradients(model, loss, drawn_a):
        assert head_gradient([of_bias], found).norm() < 1e-12 * head_gradient([of_weight], found).norm()
    with_bias = compute(model, loss, drawn_a, drawn_b, min_samples_for_fisher=1)
    model.transformer.h[0].attn.c_attn.bias.requires_grad_(False)
    # 18 inputs and the bias share the mean of I
    ridge = Ridge("relative", 1e-3 * 18 / 19)
    without = compute(model, loss, drawn_a, drawn_b, min_samples_for_fisher=1, ridge=ridge)
    for variant in VARIANTS:
        np.testing.assert_allclose(
            with_bias.scores[variant]["K"][:, :, 0],
            without.scores[variant]["K"][:, :, 0],
            rtol=1e-6,
            atol=1e-9,
        )


def test_bounds_and_means():
    g_a, g_b, fisher = tensors()
    found = score_matrices(g_a, g_b, fisher, ridge=0.0)
    assert (found["signed"].abs() <= found["symmetric"] * (1 + 1e-12)).all()
    share = g_a.square() / fisher
    assert (share <= len(g_a) * (1 + 1e-12)).all()
    torch.testing.assert_close(share.sum(dim=-1).mean(dim=0), torch.full((3,), 17.0).double())
    torch.testing.assert_close(found["directional"].mean(dim=1), g_b.abs().sum(dim=-1).T)
    # C / I <= n_A bounds the directional score by n_A |g_j|_1
    assert (found["directional"] <= len(g_a) * g_b.abs().sum(dim=-1).T[:, None] * (1 + 1e-12)).all()


def test_the_mean_over_task_a_says_nothing_of_task_a():
    model, loss = build("gpt2"), loss_of("gpt2")
    drawn_a, drawn_b = samples("gpt2", 5, seed=1), samples("gpt2", 3, seed=2)
    result = compute(model, loss, drawn_a, drawn_b, ridge=0.0, min_samples_for_fisher=1)
    for block in result.blocks:
        found = result.diagnostics[block]
        np.testing.assert_allclose(
            result.scores["directional"][block].mean(axis=0), found.live_l1_b, rtol=1e-9
        )
        np.testing.assert_allclose(result.normalised("directional", block).mean(axis=0), 1, rtol=1e-9)
        np.testing.assert_allclose(found.live_l1_b, found.gradient_l1_b)
        np.testing.assert_allclose(result.layer_head_avg("directional", block, normalised=True), 1, rtol=1e-9)


@pytest.mark.parametrize("fisher", ["pooled_n", "pooled"])
def test_swapping_tasks_transposes_signed_and_symmetric_under_a_pooled_fisher(fisher):
    gradients = collect(build("neox"), loss_of("neox"), samples("neox", 7))
    options = {"fisher": fisher, "ridge": 0.0, "min_samples_for_fisher": 1}
    there = score(gradients, range(4), range(4, 7), **options)
    back = score(gradients, range(4, 7), range(4), **options)
    for block in "QKVO":
        scale = there.scores["symmetric"][block].max()
        for variant in ("signed", "symmetric"):
            np.testing.assert_allclose(
                there.scores[variant][block],
                back.scores[variant][block].transpose(1, 0, 2, 3),
                rtol=1e-9,
                atol=1e-12 * scale,
            )
        assert not np.allclose(
            there.scores["directional"][block], back.scores["directional"][block].transpose(1, 0, 2, 3)
        )
        np.testing.assert_array_equal(
            there.diagnostics[block].gradient_l1_a, back.diagnostics[block].gradient_l1_b
        )


def test_a_list_of_samples_against_itself():
    gradients = collect(build("llama"), loss_of("llama"), samples("llama", 5))
    both = score(gradients, range(5), range(5), min_samples_for_fisher=1)
    part = score(gradients, range(1, 4), range(2, 5), fisher="pooled_n", min_samples_for_fisher=1)
    apart = compute(
        build("llama"),
        loss_of("llama"),
        samples("llama", 5),
        samples("llama", 5),
        min_samples_for_fisher=1,
    )
    for variant, block in itertools.product(VARIANTS, "QKVO"):
        np.testing.assert_allclose(both.scores[variant][block], apart.scores[variant][block], rtol=1e-9)
        if variant != "directional":
            square = both.scores[variant][block]
            np.testing.assert_allclose(square, square.transpose(1, 0, 2, 3), rtol=1e-9)
    assert part.ids_a == (1, 2, 3)
    assert part.ids_b == (2, 3, 4)
    # samples 2 and 3 stand in both tasks and count twice in the pooled mean
    repeated = [samples("llama", 5)[k] for k in (1, 2, 3, 2, 3, 4)]
    expected = compute(
        build("llama"),
        loss_of("llama"),
        repeated[:3],
        repeated[3:],
        fisher="pooled_n",
        min_samples_for_fisher=1,
    )
    np.testing.assert_allclose(part.scores["signed"]["V"], expected.scores["signed"]["V"], rtol=1e-9)


def test_entries_without_information_contribute_nothing():
    g_a, g_b, _ = tensors(heads=1, entries=4, a=2, b=2)
    g_a[..., 1] = 0
    g_a[..., 2] = 1e-30
    fisher = g_a.float().square().mean(dim=0)
    assert fisher[0, 2] == 0
    for ridge in (0.0, 1e-6, Ridge()):
        found = score_matrices(g_a.float(), g_b.float(), fisher, ridge=ridge)
        kept = [0, 3]
        wider = Ridge("relative", 1e-3 / 2) if isinstance(ridge, Ridge) else ridge
        expected = score_matrices(
            g_a[..., kept].float(), g_b[..., kept].float(), fisher[:, kept], ridge=wider
        )
        for variant in VARIANTS:
            torch.testing.assert_close(found[variant], expected[variant])


def test_a_number_is_an_absolute_ridge_with_the_seeds_clamp():
    g_a, g_b, fisher = tensors()
    found = score_matrices(g_a, g_b, fisher, ridge=1e-8)
    named = score_matrices(g_a, g_b, fisher, ridge=Ridge("absolute"))
    for variant in VARIANTS:
        assert torch.equal(found[variant], named[variant])
    tiny = torch.tensor([1e-12, 2e-9, 1.0], dtype=torch.float64)
    for ridge, values, exceeded in (
        (Ridge("absolute"), [1.01e-8, 1.2e-8, 1 + 1e-8], [True, True, False]),
        (Ridge("conditional"), [1.0001e-8, 2e-9, 1], [True, False, False]),
        (Ridge("floor"), [1e-10, 2e-9, 1], [True, False, False]),
        (Ridge(), [1e-3 / 3 + 1e-12, 1e-3 / 3 + 2e-9, 1 + 1e-3 / 3], [True, True, False]),
    ):
        divisor = ridge.denominator(tiny, tiny.mean())
        assert divisor.value.tolist() == pytest.approx(values, rel=1e-8, abs=0)
        assert divisor.clamped.tolist() == [ridge.kind != "relative", False, False]
        assert divisor.exceeded.tolist() == exceeded


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("tikhonov", None, "must be one of relative, absolute, floor, conditional, received 'tikhonov'"),
        ("relative", -1e-3, "finite and at least 0, received -0.001"),
        ("floor", math.inf, "finite and at least 0, received inf"),
        ("floor", math.nan, "finite and at least 0, received nan"),
    ],
)
def test_ridges_that_are_none(kind, value, message):
    with pytest.raises(ValueError, match=message):
        Ridge(kind, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, f: (a[:, 0], b, f), r"received \(5, 17\), \(4, 3, 17\) and \(3, 17\)"),
        (lambda a, b, f: (a, b[:, :2], f), r"received \(5, 3, 17\), \(4, 2, 17\)"),
        (lambda a, b, f: (a, b, f[:, :5]), r"and \(3, 5\)"),
        (lambda a, b, f: (a, b, f[0]), r"and \(17,\)"),
        (lambda a, b, f: (a, b.float(), f), "must all be float32, or all float64"),
        (lambda a, b, f: (a.half(), b.half(), f.half()), "float16"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        score_matrices(*change(*tensors()))


def test_given_tensors_are_left_as_they_were():
    given = tensors()
    before = [t.clone() for t in given]
    score_matrices(*given)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    with pytest.raises(ValueError, match=r"among directional, signed, symmetric, received \('cosine',\)"):
        score_matrices(*given, variants=("cosine",))
    with pytest.raises(ValueError, match="received"):
        score_matrices(*given, variants=())
    for variant in VARIANTS:
        (alone,) = score_matrices(*given, variants=(variant,)).values()
        torch.testing.assert_close(alone, score_matrices(*given)[variant])
