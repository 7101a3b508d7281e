"""Tests of heads: right against scipy, calibrated where there is nothing, and finding what is planted."""

import dataclasses
import itertools
import sys
import tracemalloc

import families
import numpy as np
import pytest
import scipy.stats
import torch

from theria.interference import (
    Ridge,
    TooFewSamplesError,
    bootstrap_intervals,
    collect,
    label_permutation,
    permutations_needed,
    score,
    significance,
)
from theria.interference.labellings import labellings

A, B = 7, 9


def gradients(generator, count=A + B, heads=1, entries=6):
    """Gradients of samples that know no task, [samples, heads, entries]."""
    sizes = generator.lognormal(sigma=0.5, size=(count, 1, 1))
    return generator.normal(size=(count, heads, entries)) * sizes


def pair_scores(found, variant="signed"):
    """Scores of all samples against all under their common Fisher information, by one block Q."""
    fisher = (found**2).mean(axis=0)
    left = {"signed": found, "symmetric": np.abs(found), "directional": found**2}[variant] / fisher
    right = found if variant == "signed" else np.abs(found)
    return {"Q": np.einsum("ihk,jhk->ijh", left, right)[:, :, None, :]}


def scipy_test(pairs, alternative, count_a, resamples, seed=1):
    def mean_between(left, right, axis):
        left, right = np.moveaxis(left, axis, -1), np.moveaxis(right, axis, -1)
        return pairs[left[..., :, None], right[..., None, :]].mean(axis=(-2, -1))

    samples = np.arange(len(pairs))
    return scipy.stats.permutation_test(
        (samples[:count_a], samples[count_a:]),
        mean_between,
        permutation_type="independent",
        vectorized=True,
        n_resamples=resamples,
        alternative=alternative,
        rng=np.random.default_rng(seed),
        axis=-1,
    )


@pytest.mark.parametrize("variant", ["signed", "symmetric", "directional"])
@pytest.mark.parametrize("alternative", ["less", "greater", "two-sided"])
@pytest.mark.parametrize("count_a", [3, 4])
def test_exact_p_values_are_scipys(variant, alternative, count_a):
    found = gradients(np.random.default_rng(3), 8, heads=3)
    pairs = pair_scores(found, variant)
    ours = label_permutation(pairs, count_a, alternative=alternative, level=0.5, permutations=100)
    assert ours.exact
    assert ours.permutations == scipy.special.comb(8, count_a, exact=True)
    for head in range(3):
        theirs = scipy_test(pairs["Q"][:, :, 0, head], alternative, count_a, 100)
        assert ours.p_values["Q"][0, head] == pytest.approx(theirs.pvalue, abs=1e-12)
        assert ours.mean["Q"][0, head] == pytest.approx(theirs.statistic, rel=1e-12)
        null = theirs.null_distribution
        effect = (theirs.statistic - null.mean()) / null.std()
        assert ours.effect["Q"][0, head] == pytest.approx(effect, rel=1e-9)


@pytest.mark.parametrize("alternative", ["less", "greater", "two-sided"])
def test_random_p_values_are_scipys_within_their_error(alternative):
    found = gradients(np.random.default_rng(4), heads=2)
    found[:A, 0] += 0.5
    pairs = pair_scores(found)
    ours = label_permutation(pairs, A, alternative=alternative, permutations=8000)
    assert not ours.exact
    assert ours.permutations == 8001
    for head in range(2):
        p = scipy_test(pairs["Q"][:, :, 0, head], alternative, A, 8000).pvalue
        assert abs(ours.p_values["Q"][0, head] - p) < 6 * np.sqrt(max(p, 1e-3) / 8000)


def test_relabellings_are_the_same_for_a_seed_and_others_for_another():
    pairs = pair_scores(gradients(np.random.default_rng(4), heads=4))
    first, again, other = (label_permutation(pairs, A, seed=seed).effect["Q"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_false_discoveries_are_scipys():
    pairs = pair_scores(gradients(np.random.default_rng(5), heads=6))
    for correction in ("bh", "by"):
        found = label_permutation(pairs, A, correction=correction)
        expected = scipy.stats.false_discovery_control(found.p_values["Q"].ravel(), method=correction)
        np.testing.assert_allclose(found.adjusted["Q"].ravel(), expected)


def test_the_largest_distance_corrects_for_heads_that_are_one():
    """Six copies of one head are one hypothesis to max-T, which then leaves its p-value as it is."""
    one = pair_scores(gradients(np.random.default_rng(6)))["Q"]
    alone = label_permutation({"Q": one}, A, correction="max_t", permutations=500)
    six = label_permutation({"Q": one.repeat(6, axis=3)}, A, correction="max_t", permutations=500)
    np.testing.assert_allclose(alone.adjusted["Q"], alone.p_values["Q"])
    np.testing.assert_allclose(six.adjusted["Q"], alone.p_values["Q"][0, 0])


def test_the_largest_distance_is_that_of_a_loop():
    found = gradients(np.random.default_rng(7), 8, heads=3)
    # in units of its own every head counts alike
    pairs = pair_scores(found)["Q"][:, :, 0] * [100, 1, 0.01]
    ours = label_permutation({"Q": pairs[:, :, None]}, 3, correction="max_t", level=0.1)
    means = []
    for chosen in itertools.combinations(range(8), 3):
        rest = [i for i in range(8) if i not in chosen]
        means.append(pairs[np.ix_(chosen, rest)].mean(axis=(0, 1)))
    distances = -(np.array(means) - np.mean(means, axis=0)) / np.std(means, axis=0)
    for head in range(3):
        expected = np.mean(distances.max(axis=1) >= distances[0, head] - 1e-9)
        assert ours.adjusted["Q"][0, head] == pytest.approx(expected)


LEVELS = (0.01, 0.05, 0.10)
DRAWS = 1000


def assert_calibrated(rejected, levels=LEVELS):
    """Shares of rejections are the levels, within three standard errors of as many coin tosses."""
    for level, share in zip(levels, rejected, strict=True):
        assert abs(share - level) <= 3 * np.sqrt(level * (1 - level) / DRAWS), (level, share)


def null_rejections(variant, alternative, draws=DRAWS):
    generator = np.random.default_rng(8)
    p_values = np.array(
        [
            label_permutation(
                pair_scores(gradients(generator), variant),
                A,
                alternative=alternative,
                permutations=199,
                level=0.1,
                seed=draw,
            ).p_values["Q"][0, 0]
            for draw in range(draws)
        ]
    )
    return [np.mean(p_values <= level) for level in LEVELS]


@pytest.mark.parametrize(
    ("variant", "alternative"), [("signed", "less"), ("signed", "two-sided"), ("directional", "greater")]
)
def test_levels_are_kept_where_there_is_nothing(variant, alternative):
    assert_calibrated(null_rejections(variant, alternative))


def test_a_test_that_permutes_nothing_is_not_calibrated(monkeypatch):
    def unpermuted(count_a, count_b, permutations, generator):
        rows = labellings(count_a, count_b, permutations, generator)
        return np.tile(rows[:1], (len(rows), 1))

    # the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["theria.interference.significance"], "labellings", unpermuted)
    with pytest.raises(AssertionError):
        assert_calibrated(null_rejections("signed", "less", draws=100))


@pytest.mark.parametrize("correction", ["bh", "by", "max_t"])
def test_corrections_keep_the_level_over_heads_where_there_is_nothing(correction):
    """With no true finding, both kinds of error are the probability of any finding at all."""
    generator = np.random.default_rng(9)
    found = [
        label_permutation(
            pair_scores(gradients(generator, heads=3)),
            A,
            correction=correction,
            permutations=399,
            level=0.10,
            seed=draw,
        )
        for draw in range(400)
    ]
    share = np.mean([f.significant("Q").any() for f in found])
    error = 3 * np.sqrt(0.1 * 0.9 / 400)
    assert share <= 0.10 + error
    if correction == "max_t":
        assert share >= 0.10 - error


@pytest.mark.parametrize("correction", ["bh", "max_t"])
def test_a_planted_conflict_is_found_and_ranked_first(correction):
    generator = np.random.default_rng(10)
    found = gradients(generator, 40, heads=12)
    direction = generator.normal(size=6)
    found[:20, 5] += 1.5 * direction
    found[20:, 5] -= 1.5 * direction
    pairs = pair_scores(found)["Q"]
    blocks = {"Q": pairs[..., :6].reshape(40, 40, 2, 3), "V": pairs[..., 6:].reshape(40, 40, 2, 3)}
    tested = label_permutation(blocks, 20, correction=correction, layers=(4, 9))
    first, second = tested.ranked()[:2]
    assert (first.block, first.layer, first.head) == ("Q", 9, 2)
    assert first.significant
    assert first.mean < 0
    assert first.effect < -4
    assert not second.significant
    assert [f.significant for f in tested.ranked()].count(True) == 1
    assert len(tested.ranked()) == 12


def test_equally_sure_heads_are_ranked_by_their_distance():
    generator = np.random.default_rng(18)
    found = gradients(generator, 40, heads=6)
    for head, strength in ((1, 1.2), (2, 3.0), (4, 1.6)):
        found[:20, head] += strength
        found[20:, head] -= strength
    first = label_permutation(pair_scores(found), 20).ranked()[:3]
    assert len({(finding.adjusted, finding.p_value) for finding in first}) == 1
    effects = [abs(finding.effect) for finding in first]
    assert effects == sorted(effects, reverse=True)
    assert {finding.head for finding in first} == {1, 2, 4}
    assert [finding.head for finding in first] != [1, 2, 4]


def test_the_common_fisher_knows_no_labels():
    """T under a relabelling is what a computation for those tasks gives with the n-weighted pooled Fisher."""
    model, loss = families.build("llama"), families.token_loss
    samples = families.samples("llama", 6)
    found = collect(model, loss, samples)
    everyone = score(found, range(6), range(6), variants=("signed",), min_samples_for_fisher=1)
    for chosen in ((0, 1), (1, 4), (3, 5)):
        rest = [i for i in range(6) if i not in chosen]
        own = collect(model, loss, [samples[i] for i in (*chosen, *rest)])
        alone = score(
            own,
            range(2),
            range(2, 6),
            variants=("signed",),
            fisher="pooled_n",
            min_samples_for_fisher=1,
        )
        for block in "QKVO":
            part = everyone.scores["signed"][block][np.ix_(chosen, rest)]
            np.testing.assert_allclose(part, alone.scores["signed"][block], rtol=1e-9, atol=1e-12)


def test_a_model_is_tested_head_by_head():
    model, loss = families.build("llama"), families.token_loss
    # the tasks name their samples alike
    found = collect(model, loss, families.samples("llama", 14), ids=[*range(5), *range(9)])
    named = dataclasses.replace(found, ids=tuple(range(14)))
    everyone = score(named, range(1, 11), range(1, 11), variants=("signed",))
    tested = significance(found, range(1, 5), range(5, 11), correction="max_t", level=0.1)
    direct = label_permutation(
        everyone.scores["signed"], 4, heads=everyone.heads, correction="max_t", level=0.1
    )
    for block in "QKVO":
        np.testing.assert_array_equal(tested.p_values[block], direct.p_values[block])
    options = {"ridge": Ridge("absolute", 1e-2), "heads": [3], "variants": ("signed",)}
    everyone = score(named, range(1, 11), range(1, 11), **options)
    direct = label_permutation(everyone.scores["signed"], 4, heads=everyone.heads, level=0.3)
    other = significance(
        found, range(1, 5), range(5, 11), ridge=Ridge("absolute", 1e-2), heads=[3], level=0.3
    )
    assert other.heads["K"] == (1,)
    for block in "QKVO":
        np.testing.assert_array_equal(other.p_values[block], direct.p_values[block])
        assert not np.array_equal(other.effect[block][:, 0], tested.effect[block][:, -1])
    assert tested.alternative == "less"
    assert tested.heads["K"] == (0, 1)
    assert tested.p_values["Q"].shape == (2, 4)
    with pytest.raises(ValueError, match="begin where task_a ends"):
        significance(found, range(4), range(5, 11))


def test_heads_without_gradients_are_not_tested_and_do_not_count():
    found = gradients(np.random.default_rng(11), heads=3)
    pairs = pair_scores(found)["Q"]
    pairs[:, :, 0, 1] = np.nan  # a frozen layer
    for sample in range(A):  # task A could be left without a sample
        pairs[sample, :, 0, 2] = pairs[:, sample, 0, 2] = np.nan
    tested = label_permutation({"Q": pairs}, A)
    assert np.isnan(tested.p_values["Q"]).tolist() == [[False, True, True]]
    np.testing.assert_array_equal(tested.adjusted["Q"][0, 0], tested.p_values["Q"][0, 0])
    assert len(tested.ranked()) == 1
    one = pair_scores(found)["Q"]
    one[0, :, 0, 0] = one[:, 0, 0, 0] = np.nan
    partly = label_permutation({"Q": one}, A)
    assert partly.mean["Q"][0, 0] == pytest.approx(one[1:A, A:, 0, 0].mean())
    assert np.isfinite(partly.p_values["Q"]).all()
    nothing = label_permutation({"Q": np.full_like(pairs, np.nan)}, A)
    assert nothing.ranked() == []


def test_a_head_that_is_zero_is_no_finding():
    tested = label_permutation({"Q": np.zeros((8, 8, 1, 2))}, 3, level=0.2, alternative="two-sided")
    assert (tested.p_values["Q"] == 1).all()
    assert (tested.effect["Q"] == 0).all()


@pytest.mark.parametrize(
    ("correction", "alternative", "hypotheses", "expected"),
    [
        ("bh", "less", 1, 19),
        ("bh", "less", 32, 639),
        ("bh", "two-sided", 32, 1279),
        ("by", "less", 2, 59),
        ("max_t", "less", 32, 19),
        ("max_t", "two-sided", 32, 19),
    ],
)
def test_permutations_that_a_level_takes(correction, alternative, hypotheses, expected):
    assert permutations_needed(0.05, hypotheses, correction=correction, alternative=alternative) == expected


@pytest.mark.parametrize("correction", ["bh", "by", "max_t"])
def test_as_many_permutations_as_needed_are_enough_and_one_fewer_is_refused(correction):
    found = gradients(np.random.default_rng(12), 24, heads=5)
    found[:12, 0] += 9
    found[12:, 0] -= 9
    needed = permutations_needed(0.02, 5, correction=correction)
    options = {"correction": correction, "level": 0.02}
    tested = label_permutation(pair_scores(found), 12, permutations=needed, **options)
    assert tested.significant("Q").tolist() == [[True, False, False, False, False]]
    with pytest.raises(ValueError, match=rf"{needed - 1} permutations cannot .* it takes {needed}"):
        label_permutation(pair_scores(found), 12, permutations=needed - 1, **options)


def rounded(pairs):
    """Symmetric scores as products in float32 give them, not quite symmetric."""
    errors = np.random.default_rng(2).uniform(-3e-8, 3e-8, size=pairs.shape) * np.abs(pairs).max()
    return (pairs + errors).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_rounding_errors_neither_make_labellings_nor_sure_findings(scale):
    pairs = pair_scores(gradients(np.random.default_rng(3), 6, heads=40))["Q"]
    pairs[0, 1] = pairs[1, 0] = 0  # an error of which is all there is
    with pytest.raises(TooFewSamplesError, match="have 10 distinct labellings"):
        label_permutation({"Q": scale * rounded(pairs)}, 3, correction="max_t")
    with pytest.raises(TooFewSamplesError, match="have 10 distinct labellings"):
        label_permutation({"Q": scale * pairs}, 3, correction="max_t")
    # directions of magnitudes differ at any scale
    directional = pair_scores(gradients(np.random.default_rng(3), 6), "directional")["Q"]
    assert label_permutation({"Q": scale * directional}, 3, correction="max_t").permutations == 20


@pytest.mark.parametrize("alternative", ["less", "two-sided"])
def test_exchanged_tasks_have_the_same_mean_in_single_precision(alternative):
    pairs = pair_scores(gradients(np.random.default_rng(4), 8, heads=30))["Q"]
    options = {"alternative": alternative, "correction": "max_t", "level": 0.2}
    exact = label_permutation({"Q": pairs}, 4, **options)
    found = label_permutation({"Q": rounded(pairs)}, 4, **options)
    np.testing.assert_array_equal(found.p_values["Q"], exact.p_values["Q"])
    np.testing.assert_array_equal(found.adjusted["Q"], exact.adjusted["Q"])


def test_relabelled_means_of_all_heads_are_never_held_at_once():
    pairs = np.random.default_rng(5).normal(size=(12, 12, 20, 20)).astype(np.float32)
    for correction in ("bh", "max_t"):
        tracemalloc.start()
        tested = label_permutation({"Q": pairs}, 5, correction=correction, level=0.9, permutations=700)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert tested.permutations == 701
        # the means would be 2.1 MiB, the scores are 0.2
        assert peak < 8 * 701 * 400


@pytest.mark.parametrize(("count_a", "labellings_there"), [(2, 15), (3, 10)])
def test_too_few_samples_for_any_number_of_permutations(count_a, labellings_there):
    pairs = pair_scores(gradients(np.random.default_rng(13), 6, heads=2))
    with pytest.raises(TooFewSamplesError, match=rf"have {labellings_there} distinct labellings.* takes 40"):
        label_permutation(pairs, count_a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count_a": 0}, "received 0 of A"),
        ({"count_a": A + B}, "0 of B"),
        ({"alternative": "more"}, "alternative must be"),
        ({"correction": "bonferroni"}, "correction must be"),
        ({"level": 0.0}, "level must be"),
    ],
)
def test_arguments_that_are_none(options, message):
    pairs = pair_scores(gradients(np.random.default_rng(14)))
    with pytest.raises(ValueError, match=message):
        label_permutation(pairs, **({"count_a": A} | options))


def test_intervals_cover_the_mean():
    """Of means over crossed samples, whose pairs are not independent: nearly as often as they say."""
    generator = np.random.default_rng(15)
    covered = []
    for draw in range(200):
        scores = generator.normal(size=(25, 1)) + generator.normal(size=(1, 30))
        scores = (scores + generator.normal(size=(25, 30)))[:, :, None, None]
        low, high = bootstrap_intervals(scores, resamples=400, seed=draw)
        covered.append(low[0, 0] <= 0 <= high[0, 0])
    assert 0.89 <= np.mean(covered) <= 0.99


def test_intervals_of_samples_of_one_task_are_scipys():
    """With one sample of A, whose weight is always 1, this is the ordinary bootstrap of a mean."""
    values = np.random.default_rng(16).lognormal(size=40)
    low, high = bootstrap_intervals(values[None, :, None, None], confidence=0.9, resamples=20000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=20000, method="percentile", rng=1
    ).confidence_interval
    np.testing.assert_allclose([low[0, 0], high[0, 0]], expected, rtol=0.02)


def test_intervals_leave_missing_pairs_out():
    scores = np.random.default_rng(17).normal(size=(5, 6, 1, 2))
    scores[:, :, 0, 1] = np.nan
    scores[2, :, 0, 0] = np.nan
    low, high = bootstrap_intervals(scores, resamples=200)
    assert low[0, 0] < np.nanmean(scores[..., 0, 0]) < high[0, 0]
    assert np.isnan([low[0, 1], high[0, 1]]).all()
    with pytest.raises(ValueError, match="0 and 6 samples"):
        bootstrap_intervals(scores[:0])


def test_rows_of_labels():
    rows = labellings(2, 3, 10, np.random.default_rng(0))
    assert rows.shape == (10, 5)
    assert len(np.unique(rows, axis=0)) == 10
    random = labellings(2, 3, 9, np.random.default_rng(0))
    assert random.shape == (10, 5)
    for found in (rows, random):
        assert found[0].tolist() == [1, 1, 0, 0, 0]
        assert (found.sum(axis=1) == 2).all()
    assert len(np.unique(random, axis=0)) > 3
    assert torch.equal(
        torch.from_numpy(random), torch.from_numpy(labellings(2, 3, 9, np.random.default_rng(0)))
    )
