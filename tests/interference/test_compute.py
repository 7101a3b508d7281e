"""The public functions: budgets, selections, missing gradients, and what they refuse."""

import itertools
import sys

import numpy as np
import pytest
import torch
from families import build, loss_of, samples, token_loss

from theria.interference import VARIANTS, collect, compute, detect_layout, score
from theria.interference.streaming import Buffers, block_scores

QUICK = {"min_samples_for_fisher": 1}


@pytest.fixture(scope="module")
def gpt2():
    return build("gpt2")


def assert_same(found, expected, rtol=1e-9):
    for variant, block in itertools.product(expected.variants, expected.blocks):
        scale = np.nanmax(np.abs(expected.scores[variant][block]), initial=0)
        np.testing.assert_allclose(
            found.scores[variant][block], expected.scores[variant][block], rtol=rtol, atol=rtol * scale
        )


# one row of six samples and of what divides takes 18 * 13 * 8 bytes, three eighths of the least
@pytest.mark.parametrize("budget", [18 * 13 * 8 / (3 / 8) / 2**20, 0.01, 0.02, 2048])
def test_any_budget_gives_the_same_numbers(gpt2, budget, tmp_path):
    drawn = samples("gpt2", 6)
    options = {"memory_budget_mib": budget, "spill_directory": tmp_path}
    gradients = collect(gpt2, token_loss, drawn, **options)
    assert (gradients.store.spilled_bytes > 0) == (budget < 1)
    assert gradients.store.held_bytes <= budget * 2**20 / 2
    expected = score(collect(gpt2, token_loss, drawn), range(4), range(4, 6), **QUICK)
    found = score(gradients, range(4), range(4, 6), **QUICK)
    assert_same(found, expected)
    for block in "QKVO":
        for quantity in ("gradient_l1_a", "live_l1_b", "slice_size", "ridge_share", "zero_share"):
            np.testing.assert_allclose(
                getattr(found.diagnostics[block], quantity), getattr(expected.diagnostics[block], quantity)
            )
    del gradients
    assert not list(tmp_path.iterdir())


def test_a_budget_below_one_row_is_refused(gpt2):
    with pytest.raises(
        ValueError, match=r"memory_budget_mib is too small: one row of .*c_attn' takes .* MiB for 4"
    ):
        compute(gpt2, token_loss, samples("gpt2", 2), samples("gpt2", 2), memory_budget_mib=1e-3, **QUICK)


def test_memory_stays_within_the_budget():
    model = torch.nn.Module()
    model.num_heads = 4
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        model.add_module(name, torch.nn.Linear(256, 256, bias=False))

    def loss(model, x):
        read = torch.tanh(model.q_proj(x) * model.k_proj(x)) * model.v_proj(x)
        return model.o_proj(read).square().mean()

    drawn = [torch.randn(20, 256) for _ in range(40)]
    gradients = collect(model, loss, drawn, memory_budget_mib=4)
    # four gradients of 40 samples are 40 MiB, and the factors of all samples 6
    assert gradients.store.spilled_bytes > 2 * 2**20
    with torch.profiler.profile(profile_memory=True) as recorded:
        score(gradients, range(20), range(20, 40))
    held = peak = 0
    for event in sorted(allocations(recorded)):
        held += event[1]
        peak = max(peak, held)
    assert 2**19 < peak < 3 * 2**20


def allocations(recorded):
    pending = list(recorded.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.alloc_size


def test_layers_heads_and_blocks_are_parts_of_the_whole():
    model = build("llama")
    drawn_a, drawn_b = samples("llama", 3, seed=1), samples("llama", 2, seed=2)
    whole = compute(model, token_loss, drawn_a, drawn_b, ridge=0.0, **QUICK)
    part = compute(
        model,
        token_loss,
        drawn_a,
        drawn_b,
        ridge=0.0,
        layers=[1],
        heads=[3, 1],
        blocks="OKV",
        variants=("signed",),
        **QUICK,
    )
    assert (part.layers, part.layer_names, part.blocks) == ((1,), ("model.layers.1.self_attn",), "KVO")
    assert part.variants == ("signed",)
    assert part.heads == {"K": (1, 0), "V": (1, 0), "O": (3, 1)}
    for block, heads in part.heads.items():
        expected = whole.scores["signed"][block][:, :, [1]][..., list(heads)]
        np.testing.assert_allclose(part.scores["signed"][block], expected, rtol=1e-9)
    assert part.diagnostics["O"].negative_share is not None
    alone = compute(model, token_loss, drawn_a, drawn_b, heads=[2], variants=("symmetric",), **QUICK)
    assert alone.heads["V"] == (1,)
    assert alone.diagnostics["V"].negative_share is None


def test_a_given_layout_is_taken(gpt2):
    drawn = samples("gpt2", 2)
    expected = compute(gpt2, token_loss, drawn, drawn, **QUICK)
    mapping = {
        "attention": "transformer.h.*.attn",
        "qkv": "c_attn",
        "order": "contiguous",
        "o": "c_proj",
        "heads": 3,
    }
    for layout in (mapping, detect_layout(gpt2)):
        assert_same(compute(gpt2, token_loss, drawn, drawn, layout=layout, **QUICK), expected)


@pytest.mark.parametrize(("count_a", "count_b"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_task_is_warned_of_and_has_no_scores(gpt2, count_a, count_b):
    drawn = samples("gpt2", 3)
    with pytest.warns(UserWarning, match="has no samples: there are no scores"):
        result = compute(gpt2, token_loss, drawn[:count_a], drawn[:count_b])
    for variant, block in itertools.product(VARIANTS, "QKVO"):
        assert result.scores[variant][block].shape == (count_a, count_b, 2, 3)
        assert (result.layer_head_avg(variant, block) == np.zeros((2, 3))).all()
        assert result.top_conflicts(variant, block, 5) == []
        assert result.normalised(variant, block).shape == (count_a, count_b, 2, 3)


def test_few_samples_behind_a_fisher_are_warned_of(gpt2):
    drawn = samples("gpt2", 3)
    for fisher, behind in (("a", 1), ("pooled", 1), ("pooled_n", 4)):
        with pytest.warns(
            UserWarning, match=f"a mean over {behind} samples, fewer than min_samples_for_fisher=10"
        ):
            result = compute(gpt2, token_loss, drawn[:1], drawn, fisher=fisher, ridge=0.0, blocks="V")
    # with one sample C / I is 1 everywhere
    with pytest.warns(UserWarning, match="a mean over 1 samples"):
        result = compute(gpt2, token_loss, drawn[:1], drawn, ridge=0.0, blocks="V")
    found = result.diagnostics["V"].gradient_l1_b
    np.testing.assert_allclose(result.scores["directional"]["V"][0], found, rtol=1e-9)
    compute(gpt2, token_loss, drawn, drawn[:1], min_samples_for_fisher=3, blocks="V")


def test_frozen_and_unused_projections_are_missing():
    model = build("llama")
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    drawn = samples("llama", 4)

    def loss(model, tokens):
        # the third sample's loss does not reach the output projection of layer 1
        found = token_loss(model, tokens)
        if tokens is drawn[2]:
            found = model.model.layers[0].self_attn.q_proj(torch.ones(16, dtype=torch.float64)).square().sum()
        return found

    result = compute(model, loss, drawn[:3], drawn[3:], **QUICK)
    keys, outputs, queries = (result.scores["signed"][b] for b in "KOQ")
    assert np.isnan(keys[:, :, 0]).all()
    assert np.isfinite(keys[:2, :, 1]).all()
    assert np.isnan(outputs[2]).all()
    assert np.isfinite(outputs[:2]).all()
    assert np.isfinite(queries[:, :, 0]).all()
    assert np.isnan(queries[2, :, 1]).all()
    assert result.missing_a["K"].tolist() == [[True, False], [True, False], [True, True]]
    assert result.missing_b["K"].tolist() == [[True, False]]
    assert result.missing("O")[:, 0].tolist() == [[False, False], [False, False], [True, True]]
    assert np.isnan(result.diagnostics["O"].gradient_l1_a[2]).all()
    for of_b in (result.diagnostics["K"].gradient_l1_b, result.diagnostics["K"].live_l1_b):
        assert np.isnan(of_b[0, 0]).all()
        assert np.isfinite(of_b[0, 1]).all()
    assert np.isnan(result.layer_head_avg("signed", "K")[0]).all()
    assert np.isfinite(result.layer_head_avg("signed", "K")[1]).all()
    assert {c.sample_i for c in result.top_conflicts("symmetric", "O", 1000)} == {0, 1}
    # the missing sample is in no mean: the others have the scores that they have without it
    without = compute(model, loss, drawn[:2], drawn[3:], **QUICK)
    np.testing.assert_allclose(outputs[:2], without.scores["signed"]["O"], rtol=1e-9)
    pooled = compute(model, loss, drawn[:3], drawn[3:], fisher="pooled_n", **QUICK)
    without = compute(model, loss, drawn[:2], drawn[3:], fisher="pooled_n", **QUICK)
    np.testing.assert_allclose(pooled.scores["signed"]["O"][:2], without.scores["signed"]["O"], rtol=1e-9)


def test_what_memory_held_before_does_not_matter(monkeypatch):
    model = build("gpt2")
    drawn = samples("gpt2", 5)
    with pytest.warns(UserWarning, match="not finite"):
        gradients = collect(model, lambda m, t: token_loss(m, t) * (np.nan if t is drawn[1] else 1), drawn)
    expected = score(gradients, range(3), range(3, 5), fisher="pooled", **QUICK)
    take = Buffers.take
    monkeypatch.setattr(Buffers, "take", lambda *args: take(*args).fill_(np.nan))
    found = score(gradients, range(3), range(3, 5), fisher="pooled", **QUICK)
    assert_same(found, expected, rtol=0)
    assert np.isfinite(found.scores["signed"]["Q"][0]).all()
    np.testing.assert_array_equal(found.diagnostics["K"].live_l1_b, expected.diagnostics["K"].live_l1_b)


def test_entries_without_information_are_counted_and_left_out():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.num_heads = 2
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        model.add_module(name, torch.nn.Linear(4, 4, dtype=torch.float64))

    def loss(model, x):
        read = torch.softmax(model.q_proj(x) @ model.k_proj(x).mT, dim=-1) @ model.v_proj(x)
        return model.o_proj(read).square().mean()

    drawn_a, drawn_b = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    # a feature that task A never has moves one of four columns of weights, and no bias
    drawn_a[..., 1] = 0
    result = compute(model, loss, list(drawn_a), list(drawn_b), ridge=0.0, **QUICK)
    for block in "QV":
        found = result.diagnostics[block]
        np.testing.assert_allclose(found.zero_share, 2 / 10)
        assert (found.live_l1_b < found.gradient_l1_b).all()
        np.testing.assert_allclose(result.scores["directional"][block].mean(axis=0), found.live_l1_b)
    assert (result.diagnostics["O"].zero_share == 0).all()


@pytest.mark.parametrize("factor", [1e19, 1e30])
@pytest.mark.parametrize("length", [3, 24])
def test_gradients_whose_squares_overflow_are_missing_and_named(factor, length):
    """One such sample would make the Fisher information infinite, and all scores 0."""
    model = build("llama").float()
    drawn = samples("llama", 4) + samples("llama", 1, least=length, most=length)

    def loss(model, tokens):
        return token_loss(model, tokens) * (factor if tokens is drawn[4] else 1)

    with pytest.warns(UserWarning, match=r"1 samples .* too large to be squared, .* missing: \[4\]"):
        gradients = collect(model, loss, drawn)
    assert not gradients.store[4]
    with pytest.warns(UserWarning, match="fewer than"):
        found = score(gradients, range(5), range(4))
    expected = score(gradients, range(4), range(4), min_samples_for_fisher=1)
    for block in "QKVO":
        assert found.missing_a[block][:, 0].tolist() == [False] * 4 + [True]
        for variant in found.variants:
            wanted = expected.scores[variant][block]
            np.testing.assert_allclose(found.scores[variant][block][:4], wanted, rtol=1e-4, atol=1e-4)
            assert np.isnan(found.scores[variant][block][4]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_missing_and_named(gpt2, value):
    drawn = samples("gpt2", 4)

    def loss(model, tokens):
        return token_loss(model, tokens) * (value if tokens is drawn[1] else 1.0)

    with pytest.warns(UserWarning, match=r"1 samples have gradients that are not finite .*\['second'\]"):
        result = compute(gpt2, loss, drawn[:3], drawn[3:], ids_a=["first", "second", "third"], **QUICK)
    expected = compute(gpt2, token_loss, [drawn[0], drawn[2]], drawn[3:], **QUICK)
    for variant, block in itertools.product(VARIANTS, "QKVO"):
        assert np.isnan(result.scores[variant][block][1]).all()
        np.testing.assert_allclose(
            result.scores[variant][block][[0, 2]], expected.scores[variant][block], rtol=1e-9
        )
    assert result.diagnostics["Q"].negative_share == pytest.approx(expected.diagnostics["Q"].negative_share)


def test_ids_are_of_any_type_and_come_back(gpt2):
    drawn = samples("gpt2", 3)
    ids = [("text", 3), "a_7", frozenset({1})]
    result = compute(gpt2, token_loss, drawn, drawn[:2], ids_a=ids, ids_b=["a_7", 5], **QUICK)
    assert (result.ids_a, result.ids_b) == (tuple(ids), ("a_7", 5))
    table = result.top_conflicts("directional", "V", 1000)
    assert len(table) == 3 * 2 * 2 * 3
    assert {row.sample_i for row in table} == set(ids)
    for row in table[:5]:
        place = (ids.index(row.sample_i), ["a_7", 5].index(row.sample_j), row.layer, row.head)
        assert result.scores["directional"]["V"][place] == row.score
    assert [row.score for row in table] == sorted((row.score for row in table), reverse=True)


def test_the_strongest_conflicts_of_the_signed_score_are_the_most_negative(gpt2):
    drawn = samples("gpt2", 5)
    result = compute(gpt2, token_loss, drawn[:3], drawn[3:], layers=[1], heads=[2, 0], **QUICK)
    scores = result.scores["signed"]["O"]
    table = result.top_conflicts("signed", "O", 3)
    assert [row.score for row in table] == sorted(scores[scores < 0])[:3]
    assert {row.layer for row in table} == {1}
    assert {row.head for row in table} <= {2, 0}
    assert len(result.top_conflicts("signed", "O", 1000)) == (scores < 0).sum()
    share = (scores < 0).mean(axis=(0, 1))
    np.testing.assert_allclose(result.diagnostics["O"].negative_share, share)
    assert result.top_conflicts("signed", "O", 0) == []
    with pytest.raises(ValueError, match="k must be at least 0, received -1"):
        result.top_conflicts("signed", "O", -1)


def test_averages_are_over_pairs(gpt2):
    drawn = samples("gpt2", 5)
    result = compute(gpt2, token_loss, drawn[:3], drawn[3:], **QUICK)
    scores = result.scores["symmetric"]["K"]
    np.testing.assert_allclose(result.layer_head_avg("symmetric", "K"), scores.mean(axis=(0, 1)))
    size = result.diagnostics["K"].gradient_l1_b
    expected = (scores / size[None]).mean(axis=(0, 1))
    np.testing.assert_allclose(result.layer_head_avg("symmetric", "K", normalised=True), expected)
    assert result.tokens_a.tolist() == [len(t) - 1 for t in drawn[:3]]
    assert result.tokens_b.tolist() == [len(t) - 1 for t in drawn[3:]]


def test_float32_models_give_float32_and_the_same_scores():
    exact = build("neox")
    drawn = samples("neox", 5)
    expected = compute(exact, token_loss, drawn[:3], drawn[3:], **QUICK)
    result = compute(exact.float(), token_loss, drawn[:3], drawn[3:], **QUICK)
    assert result.scores["signed"]["Q"].dtype == np.float32
    assert_same(result, expected, rtol=1e-3)


def test_matrix_products_are_of_full_precision_and_the_setting_comes_back(gpt2, monkeypatch):
    before = torch.get_float32_matmul_precision()
    gradients = collect(gpt2, token_loss, samples("gpt2", 2))
    inside = set()

    def noting(*args):
        inside.add(torch.get_float32_matmul_precision())
        return block_scores(*args)

    # the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["theria.interference.compute"], "block_scores", noting)
    torch.set_float32_matmul_precision("medium")
    try:
        score(gradients, range(1), range(1, 2), **QUICK)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert inside == {"highest"}


def test_devices(gpt2, monkeypatch):
    drawn = samples("gpt2", 2)
    assert collect(gpt2, token_loss, drawn).device == torch.device("cpu")
    with pytest.raises(ValueError, match="must be cpu, cuda or auto, received 'gpu'"):
        collect(gpt2, token_loss, drawn, computation_device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert collect(gpt2, token_loss, drawn, computation_device="auto").device == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA device is available"):
        collect(gpt2, token_loss, drawn, computation_device="cuda")


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_float64_on_a_cpu(tmp_path):
    model = build("llama")
    drawn = samples("llama", 6)
    expected = compute(model, token_loss, drawn[:4], drawn[4:], **QUICK)
    model = model.float()
    on_gpu = [t.cuda() for t in drawn]
    for place, options in (
        (model, {"computation_device": "cuda"}),
        (
            model.cuda(),
            {"computation_device": "cuda", "memory_budget_mib": 0.02, "spill_directory": tmp_path},
        ),
        (model.cuda(), {"computation_device": "cpu"}),
    ):
        on = on_gpu if next(place.parameters()).is_cuda else drawn
        assert_same(compute(place, token_loss, on[:4], on[4:], **options, **QUICK), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids_a": ["x"]}, "ids_a must name every sample: received 1 ids for 2 samples"),
        ({"ids_b": ["x", "x"]}, r"ids_b names several samples by the same id: \['x'\]"),
        ({"variants": ("signed", "other")}, "variants must be among"),
        ({"fisher": "b"}, "fisher must be one of a, pooled, pooled_n, received 'b'"),
        ({"layers": [2]}, r"layers must be distinct numbers below 2, received \[2\]"),
        ({"layers": [0, 0]}, "distinct numbers"),
        ({"layers": []}, "distinct numbers"),
        ({"heads": [3]}, r"heads must be distinct numbers below 3, received \[3\]"),
        ({"heads": [-1]}, "below 3"),
        ({"heads": [0, 0]}, "distinct"),
        ({"blocks": "QX"}, r"distinct letters among \['QKVO'\], received 'QX'"),
        ({"blocks": "QQ"}, "received 'QQ'"),
        ({"blocks": ""}, "received ''"),
        ({"memory_budget_mib": 0}, "memory_budget_mib must be above 0, received 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, received 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(gpt2, options, message):
    drawn = samples("gpt2", 2)
    with pytest.raises(ValueError, match=message):
        compute(gpt2, token_loss, drawn, drawn, **options)


def test_the_classifier_has_no_output_projection_to_ask_for():
    model, loss = build("seq_classifier"), loss_of("seq_classifier")
    drawn = samples("seq_classifier", 2)
    with pytest.raises(ValueError, match=r"among \['QKV'\], received 'QKVO'"):
        compute(model, loss, drawn, drawn, blocks="QKVO")


def test_layers_that_differ_have_to_be_chosen():
    layout = (
        *detect_layout(build("gpt2")),
        *detect_layout(build("neox")),
        *detect_layout(build("seq_classifier")),
    )
    model = torch.nn.Module()
    model.transformer, model.gpt_neox = build("gpt2").transformer, build("neox").gpt_neox
    model.q_proj, model.k_proj, model.v_proj = (torch.nn.Linear(6, 6) for _ in range(3))

    def loss(model, number):
        return sum(p.double().square().sum() for p in model.parameters()) * number

    with pytest.raises(ValueError, match=r"layers differ in their blocks, \['QKV', 'QKVO'\]"):
        collect(model, loss, [1.0], layout=layout)
    gradients = collect(model, loss, [1.0, 2.0], layout=layout, layers=[0, 2])
    with pytest.raises(ValueError, match=r"different numbers of heads, {'Q': \[2, 3\]"):
        score(gradients, range(1), range(1, 2), **QUICK)
    assert score(gradients, range(1), range(1, 2), per_head=False, **QUICK).layers == (0, 2)


@pytest.mark.parametrize(
    ("task_a", "task_b", "message"),
    [
        (range(0, 2, 2), range(2), "task_a must be a range of step 1 within 2 samples"),
        (range(2), range(1, 3), "task_b must be a range"),
        (range(-1, 1), range(2), "task_a must be a range"),
    ],
)
def test_ranges_that_are_not_there(gpt2, task_a, task_b, message):
    gradients = collect(gpt2, token_loss, samples("gpt2", 2))
    with pytest.raises(ValueError, match=message):
        score(gradients, task_a, task_b)
    with pytest.raises(ValueError, match="3 ids were given for 2 samples"):
        collect(gpt2, token_loss, samples("gpt2", 2), ids=[1, 2, 3])
