"""The page of results: its lists name tests that are there, its tables are the library's numbers."""

import argparse
import ast
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import theria.interference
from datamodules import CalibrationText, SyntheticSeqCls
from datamodules.documents import Domain
from experiments.interference.__main__ import study_parser
from experiments.interference.ablation import ablation, verdict
from experiments.interference.checklist import LISTS
from experiments.interference.study import LEFT_OUT, METHODS, write_page
from experiments.interference.trained import train_classifier, train_language_model
from theria.interference import score, score_matrices
from theria.interference.significance import significance

TESTS = Path(__file__).parents[2]
PAGE = TESTS.parent / "docs" / "results" / "interference.md"

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # the tests are about numbers, not about how many processes read the data
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Both models, hardly trained, on small data."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, word in (("prose", "the cat sat on mat"), ("code", "def f(x): return x")):
        (folder / domain).mkdir()
        for number in range(40):
            lines = (f"{word} {number} {line * number}" for line in range(9))
            (folder / domain / f"{number}.txt").write_text("\n".join(lines))
    text = CalibrationText(
        domains={name: Domain(files=[f"{folder}/{name}/*.txt"]) for name in ("prose", "code")},
        sequence_length=24,
        train_sequences_per_epoch=40,
        val_sequences=None,
        recall=None,
        val_fraction=0.3,
        test_fraction=0.2,
        cache_dir=str(folder / "cache"),
    )
    sizes = {"length": 6, "width": 8, "num_classes": 3, "num_signal_positions": 2}
    classes = SyntheticSeqCls(**sizes, support_size=10, query_size=12, meta_batch_size=4)
    return train_language_model(2, 22, 0, text), train_classifier(2, 22, 0, classes)


def settings(out, top=20):
    return argparse.Namespace(out=out, top=top, seed=0)


def names_of_tests(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_lists_name_is_there():
    assert [len(points) for _, points in LISTS[:3]] == [4, 3, 4]  # as many as were asked for
    for _, points in LISTS:
        for point in points:
            assert point.tests
            for cited in point.tests:
                file, name = cited.split("::")
                assert name in names_of_tests(TESTS / file), cited


def test_the_design_is_stated_where_it_was_asked_for():
    design = theria.interference.__doc__
    for stated in ("METRIC DESIGN", "Diagonal", "Directional", "Kronecker", "float32", "|g_j|_1", "pooled"):
        assert stated in design
    for formula in ("g_ik^2 / (I_k + ridge) |g_jk|", "g_ik g_jk / ", "|g_ik| |g_jk| / "):
        assert formula in design
    assert "(samples of A, heads, entries)" in score_matrices.__doc__
    assert "Raises" in theria.interference.compute.__doc__


def test_the_ablation_is_that_of_the_library(models):
    language, classifier = models
    rows = {(row.variant, row.fisher): row for row in ablation(language, 20)}
    assert len(rows) == 9
    results = {
        fisher: score(language.gradients, language.task_a, language.task_b, fisher=fisher)
        for fisher in ("a", "pooled", "pooled_n")
    }
    for (variant, fisher), row in rows.items():
        mine, a = results[fisher].scores[variant], results["a"].scores
        pairs = [scipy.stats.spearmanr(mine[b].ravel(), a[variant][b].ravel())[0] for b in "QKVO"]
        assert row.pairs == pytest.approx(np.mean(pairs), abs=1e-6)
        heads = [
            scipy.stats.spearmanr(mine[b].mean((0, 1)).ravel(), a[variant][b].mean((0, 1)).ravel())[0]
            for b in "QKVO"
        ]
        assert row.heads == pytest.approx(np.mean(heads), abs=0.05)
        sign = -1 if variant == "signed" else 1
        beside = [
            scipy.stats.spearmanr(sign * mine[b].ravel(), a["directional"][b].ravel())[0] for b in "QKVO"
        ]
        assert row.directional == pytest.approx(np.mean(beside), abs=1e-6)
        kept = []
        for b in "QKVO":
            best = [np.argsort(-sign * x.ravel(), kind="stable")[:20] for x in (mine[b], a[variant][b])]
            kept.append(len(set(best[0]) & set(best[1])) / 20)
        assert row.overlap == pytest.approx(np.mean(kept), abs=0.02)
        every = np.concatenate([mine[b].ravel() for b in "QKVO"])
        assert row.mean == pytest.approx(every.mean(), rel=1e-4)
        assert row.negative == pytest.approx((every < 0).mean())
        if fisher == "a":
            assert [row.pairs, row.heads, row.overlap] == pytest.approx([1, 1, 1])
    assert np.isnan(ablation(classifier, 20)[1].heads)
    assert rows["signed", "pooled"].pairs < 1


def test_pooling_is_judged_by_the_worst_figure(models):
    rows = ablation(models[0], 20)
    for row in rows:
        expected = "changes" if min(row.pairs, row.heads, row.overlap) < 0.95 else None
        if row.fisher != "a" and expected:
            assert f"Pooling changes the {row.variant} ranking" in verdict(rows, 20)
    same = [row._replace(pairs=1.0, heads=1.0, overlap=1.0) for row in rows]
    assert verdict(same, 20).count("hardly changes") == 3
    for worse in ({"pairs": 0.9}, {"heads": 0.9}, {"overlap": 0.9}):
        changed = [row._replace(**worse) if row.fisher == "pooled_n" else row for row in same]
        assert "hardly" not in verdict(changed, 20)


def test_the_page_has_every_part(models, tmp_path):
    page = write_page(models, settings(tmp_path / "docs" / "interference.md")).read_text()
    for part in ("Must do", "Should do", "Nice to have", "Method", "Variants and pooling", "left out"):
        assert part in page
    assert METHODS in page
    for said in ("diagonal", "directional", "unsigned", "|g_j|_1"):
        assert said in METHODS
    assert LEFT_OUT.split("{entries}")[0] in page
    assert page.count("&#10003;") == sum(len(points) for _, points in LISTS)
    for model in models:
        assert model.what in page
        assert (tmp_path / "docs" / f"interference_{model.name}.png").stat().st_size > 1000
        tests = significance(model.gradients, model.task_a, model.task_b)
        first = tests.ranked()[0]
        assert f"| {first.block} | {first.layer} | {first.head} | {first.mean:.3g} |" in page
        found = [finding for finding in tests.ranked() if finding.significant]
        assert f"Significant at 0.05 (framed): {len(found)}, where" in page
        assert f"on the average: {sum(finding.mean < 0 for finding in found)}. The surest" in page
    assert [len(model.task_b) for model in models] == [11, 11]


def test_a_full_fisher_information_says_nothing_of_pairs():
    """g_i^T F^+ g_j = n for i = j, 0 otherwise, as the page says, with fewer samples than entries."""
    gradients = np.random.default_rng(0).normal(size=(5, 12))
    inverse = np.linalg.pinv(gradients.T @ gradients / 5)
    np.testing.assert_allclose(gradients @ inverse @ gradients.T, 5 * np.eye(5), atol=1e-9)


def test_the_page_kept_is_of_this_command():
    page = PAGE.read_text()
    assert "`python -m experiments.interference study " in page
    assert METHODS in page
    for _, points in LISTS:
        for point in points:
            assert f"&#10003; {point.asked} | {point.there_is}" in page.replace(r"\|", "|")
    for line in page.replace(r"\|", "").splitlines():
        if line.startswith("| ") and "`" in line:
            assert line.count("|") == 4  # three cells
    assert study_parser().parse_args([]).out == Path("docs/results/interference.md")
