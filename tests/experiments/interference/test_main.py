"""The command on a checkpoint of ours and on a Hugging Face directory: files, and numbers that agree."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from callbacks.interference_figures import draw_heat_map
from experiments.interference.__main__ import main
from experiments.interference.models import load, token_loss
from lightning_modules import MemoryLM
from theria.interference import Ridge, bootstrap_intervals, collect, compute, score, significance

WORDS = ["[unk]", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", "then", "it", "was", "far"]
SIZES = {"width": 16, "blocks": 2, "heads": 2, "window": 8, "memory_heads": 1, "memory_dim": 8, "slots": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of randomly initialised weights, as Lightning writes it."""
    torch.manual_seed(0)
    module = MemoryLM(vocab_size=257, backend="reference", **SIZES)
    torch.nn.init.normal_(module.model.embedding.weight, std=0.5)
    path = tmp_path_factory.mktemp("run") / "model.ckpt"
    torch.save(
        {
            "state_dict": module.state_dict(),
            "hyper_parameters": dict(module.hparams),
            "datamodule_hyper_parameters": {"tokenizer": "byte"},
            "global_step": 3,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A directory with a model of random weights and a tokenizer of words."""
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=12, n_layer=2, n_head=3, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[unk]").save_pretrained(directory)
    return directory


@pytest.fixture
def files(tmp_path):
    """Task A as paragraphs, task B as JSON lines with names."""
    words = np.random.default_rng(0).choice(WORDS[1:], size=(24, 7))
    text = "\n\n".join(" ".join(row) for row in words[:12]) + "\n\n\n" + "the\nlast one"
    (tmp_path / "a.txt").write_text(text)
    rows = [{"id": f"b{i}", "text": " ".join(row)} for i, row in enumerate(words[12:])]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path / "a.txt", tmp_path / "b.jsonl"


def run(model, files, out, *options):
    paths = ("--task-a", str(files[0]), "--task-b", str(files[1]), "--out", str(out))
    main(["--model", str(model), *paths, "--resamples", "50", *options])
    return out


@pytest.mark.parametrize("which", ["ours", "hugging_face"])
def test_every_file_is_written_and_the_numbers_are_the_librarys(
    which, checkpoint, hugging_face, files, tmp_path
):
    model = f"hf:{hugging_face}" if which == "hugging_face" else checkpoint
    options = ("--samples", "10", "--max-tokens", "20", "--layers", "1", "--level", "0.1", "--fisher", "a")
    out = run(model, files, tmp_path / "out", *options)
    names = {path.name for path in out.iterdir()}
    tables = {"heads.csv", "conflicts.csv", "samples.csv"}
    assert names == tables | {"arrays.npz", "report.md", "directional.png", "signed.png", "symmetric.png"}
    loaded = load(str(model), None)
    texts = [part for part in files[0].read_text().split("\n\n") if part.strip()][:10]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    a, b = ([loaded.encode(t)[:20] for t in ts] for ts in (texts, [row["text"] for row in rows[:10]]))
    ids = {"ids_a": range(1, 21, 2), "ids_b": [row["id"] for row in rows[:10]]}
    found = compute(loaded.model, token_loss, a, b, layers=[1], ridge=Ridge(), **ids)
    arrays = np.load(out / "arrays.npz")
    heads = pd.read_csv(out / "heads.csv")
    for block in "QKVO":
        for variant in found.variants:
            np.testing.assert_array_equal(arrays[f"scores_{variant}_{block}"], found.scores[variant][block])
            mine = heads[heads["block"] == block]
            mean = found.layer_head_avg(variant, block).ravel()
            np.testing.assert_allclose(mine[variant], mean, rtol=1e-6)
            assert (mine[f"{variant}_low"] <= mine[variant] + 1e-12).all()
            assert (mine[variant] <= mine[f"{variant}_high"] + 1e-12).all()
            relative = found.layer_head_avg(variant, block, normalised=True).ravel()
            np.testing.assert_allclose(mine[f"{variant}_per_l1"], relative, rtol=1e-5)
        np.testing.assert_allclose(mine["adjusted"], arrays[f"adjusted_{block}"].ravel())
    assert arrays["ids_b"].tolist() == [f"b{i}" for i in range(10)]
    conflicts = pd.read_csv(out / "conflicts.csv")
    first = conflicts[(conflicts["variant"] == "symmetric") & (conflicts["block"] == "V")].iloc[0]
    expected = found.top_conflicts("symmetric", "V", 1)[0]
    assert (first["sample_i"], first["sample_j"], first["head"]) == (
        expected.sample_i,
        expected.sample_j,
        expected.head,
    )
    assert first["score"] == pytest.approx(expected.score, rel=1e-6)


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def tables_of(text):
    """Lines of tables with the number of their table."""
    found, number, inside = [], 0, False
    for line in text.splitlines():
        number += line.startswith("|") and not inside
        inside = line.startswith("|")
        if inside:
            found.append((number, line))
    return found


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()


def test_the_report_is_written_from_the_arrays_and_says_what_it_cannot(checkpoint, files, tmp_path):
    out = run(checkpoint, files, tmp_path / "out", "--ridge", "floor:0", "--top", "4", "--level", "0.1")
    text = (out / "report.md").read_text()
    arrays = np.load(out / "arrays.npz")
    for variant in ("signed", "directional"):
        means = {
            (block, str(layer), str(head)): arrays[f"scores_{variant}_{block}"][:, :, layer, head].mean()
            for block in "QKVO"
            for layer in range(2)
            for head in range(2)
        }
        found = cells(section(text, variant.capitalize()))[2:6]
        best = sorted(means.values(), reverse=variant != "signed")[:4]
        for row, expected in zip(found, best, strict=True):
            assert float(row[3]) == pytest.approx(expected, rel=1e-3)
            assert means[tuple(row[:3])] == pytest.approx(expected, rel=1e-3)
    tested = cells(section(text, "Significance"))[2:]
    ranked = np.sort(np.concatenate([arrays[f"adjusted_{block}"].ravel() for block in "QKVO"]))
    assert [float(row[6]) for row in tested] == pytest.approx(ranked[:4].tolist(), rel=1e-3)
    p_values = np.sort(np.concatenate([arrays[f"p_values_{block}"].ravel() for block in "QKVO"]))
    assert [float(row[5]) for row in tested] == pytest.approx(p_values[:4].tolist(), rel=1e-3)
    assert p_values[3] < p_values[-1]
    significant = [row for row in tested if row[7] == "yes"]
    assert len(significant) == min((ranked <= 0.1).sum(), 4)
    assert f"Significant at 0.1: {(ranked <= 0.1).sum()}, of which" in text
    assert f"out {tmp_path / 'out'}," in text
    assert "ridge floor:0" in text
    widths = {(line.count("|"), part) for part, line in tables_of(text)}
    assert len(widths) == len({part for _, part in widths})  # every row of a table has as many cells
    limits = "\n".join(section(text, "What these figures cannot say"))
    assert "the mean over i of the directional M_ij is |g_j|_1 exactly" in limits
    stated = float(limits.split("differ by ")[1].split(" of |g_j|_1")[0])
    assert stated < 1e-4
    for missing in (
        "agree less than samples",
        "covariance",
        "do not tell help from harm",
        "first-order",
        "ridge",
    ):
        assert missing in limits
    assert "`" + str(checkpoint) + "`" in text


def test_with_a_ridge_the_deviation_is_stated_and_pooled_has_none(checkpoint, files, tmp_path):
    out = run(checkpoint, files, tmp_path / "ridge", "--ridge", "relative:0.5", "--test", "")
    text = (out / "report.md").read_text()
    stated = float(text.split("differ by ")[1].split(" of |g_j|_1")[0])
    arrays = np.load(out / "arrays.npz")
    l1 = {block: arrays[f"live_l1_b_{block}"] for block in "QKVO"}
    deviations = [arrays[f"scores_directional_{b}"].mean(axis=0) / l1[b] - 1 for b in "QKVO"]
    assert stated > 0.05
    assert stated == pytest.approx(np.abs(np.stack(deviations)).max(), rel=0.01)
    assert "Not tested: it was not asked for." in text
    out = run(checkpoint, files, tmp_path / "pooled", "--fisher", "pooled", "--variants", "signed")
    assert "differ by" not in (out / "report.md").read_text()
    assert not (out / "directional.png").exists()


def test_every_option_reaches_the_library(hugging_face, files, tmp_path, monkeypatch):
    framed = {}

    def noting(result, variant, *, significant):
        framed[variant] = significant
        return draw_heat_map(result, variant, significant=significant)

    monkeypatch.setattr("experiments.interference.run.draw_heat_map", noting)
    # of its two layers the second alone
    layout = {"attention": "transformer.h.1.attn", "qkv": "c_attn", "order": "contiguous", "o": "c_proj"}
    options = ("--samples", "6", "--blocks", "VO", "--variants", "signed", "symmetric", "--fisher", "pooled")
    options += (
        "--layout",
        json.dumps(layout),
        "--ridge",
        "conditional:1e-6",
        "--level",
        "0.2",
        "--seed",
        "3",
    )
    options += (
        "--test",
        "symmetric",
        "--correction",
        "max_t",
        "--permutations",
        "300",
        "--confidence",
        "0.5",
    )
    with pytest.warns(UserWarning, match="a mean over 6 samples"):
        out = run(f"hf:{hugging_face}", files, tmp_path / "out", *options)
    loaded = load(f"hf:{hugging_face}", None)
    texts = [part for part in files[0].read_text().split("\n\n") if part.strip()][:6]
    texts += [json.loads(line)["text"] for line in files[1].read_text().splitlines()[:6]]
    gradients = collect(
        loaded.model, token_loss, [loaded.encode(text) for text in texts], blocks="VO", layout=layout
    )
    tasks, ridge = (range(6), range(6, 12)), Ridge("conditional", 1e-6)
    expected = score(
        gradients,
        *tasks,
        variants=("signed", "symmetric"),
        fisher="pooled",
        ridge=ridge,
        min_samples_for_fisher=1,
    )
    tested = significance(
        gradients,
        *tasks,
        variant="symmetric",
        ridge=ridge,
        correction="max_t",
        level=0.2,
        permutations=300,
        seed=3,
    )
    arrays, heads = np.load(out / "arrays.npz"), pd.read_csv(out / "heads.csv")
    assert arrays["scores_signed_O"].shape == (6, 6, 1, 3)
    assert set(heads["block"]) == {"V", "O"}
    for block in "VO":
        for variant in expected.variants:
            found = arrays[f"scores_{variant}_{block}"]
            np.testing.assert_array_equal(found, expected.scores[variant][block])
        np.testing.assert_array_equal(arrays[f"adjusted_{block}"], tested.adjusted[block])
        interval = bootstrap_intervals(expected.scores["signed"][block], confidence=0.5, resamples=50, seed=3)
        mine = heads[heads["block"] == block]
        for column, bounds in zip(("signed_low", "signed_high"), interval, strict=True):
            np.testing.assert_allclose(mine[column], bounds.ravel(), rtol=1e-6)
    assert framed["signed"] is None
    for block, significant in framed["symmetric"].items():
        np.testing.assert_array_equal(significant, tested.significant(block))


def test_too_few_samples_for_a_test_are_said(checkpoint, files, tmp_path):
    with pytest.warns(UserWarning, match="fewer than"):
        out = run(checkpoint, files, tmp_path / "out", "--samples", "2", "--layers", "0")
    assert "Not tested: 2 and 2 samples have 3 distinct labellings" in (out / "report.md").read_text()
    assert "adjusted" not in pd.read_csv(out / "heads.csv")


def test_a_tokenizer_can_be_given(checkpoint, hugging_face, tmp_path):
    words = load(f"hf:{hugging_face}", str(hugging_face / "tokenizer.json"))
    assert words.encode("the cat").tolist() == [1, 3]
    ours = load(str(checkpoint), None)
    assert ours.encode("ab").tolist() == [256, 97, 98]
    assert not ours.model.training


def test_what_cannot_be_used_ends_in_one_line(checkpoint, hugging_face, files, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a cat"}\n{"texts": "x"}\n')
    (tmp_path / "worse.jsonl").write_text("{\n")
    (tmp_path / "named.jsonl").write_text('{"text": "a cat", "id": [1]}\n')
    (tmp_path / "twice.jsonl").write_text('{"text": "a cat", "id": "x"}\n{"text": "a dog", "id": "x"}\n')
    (tmp_path / "long.txt").write_text("the " * 70)
    (tmp_path / "bare").mkdir()
    for model, given, options, message in (
        (tmp_path / "no.ckpt", files, (), "there is no such"),
        (f"hf:{tmp_path}", files, (), "has no config.json"),
        (f"hf:{hugging_face}", files, ("--tokenizer", "byte"), "knows 14 tokens, the tokenizer 256"),
        (checkpoint, files, ("--tokenizer", str(tmp_path / "t.json")), "there is no tokenizer file"),
        (checkpoint, files, ("--tokenizer", "bpe"), "name its JSON file by --tokenizer"),
        (checkpoint, files, ("--ridge", "soft"), "ridge kind must be"),
        (checkpoint, (tmp_path / "gone", files[1]), (), "cannot be read"),
        (checkpoint, (tmp_path / "empty.txt", files[1]), (), "has no sample of at least 2 tokens"),
        (checkpoint, (files[0], tmp_path / "bad.jsonl"), (), "bad.jsonl:2 has no text in a field 'text'"),
        (checkpoint, (files[0], tmp_path / "worse.jsonl"), (), "worse.jsonl:1 is not JSON"),
        (checkpoint, (files[0], tmp_path / "named.jsonl"), (), "id must be a string or a whole number"),
        (checkpoint, (files[0], tmp_path / "twice.jsonl"), (), "several samples by the same id: ['x']"),
        (f"hf:{hugging_face}", (files[0], tmp_path / "long.txt"), (), "has a sample of 70 tokens, but"),
        (checkpoint, files, ("--samples", "-1"), "--samples: -1 is not at least 1"),
        (checkpoint, files, ("--max-tokens", "0"), "--max-tokens: 0 is not at least 1"),
        (checkpoint, files, ("--level", "2"), "--level: 2.0 is not between 0 and 1"),
        (checkpoint, files, ("--layout", "{"), "--layout is not JSON"),
        (checkpoint, files, ("--layout", "[1]"), "--layout must be a JSON object, received [1]"),
        (checkpoint, files, ("--layers", "9"), "layers must be distinct numbers below 2, received [9]"),
        (checkpoint, files, ("--permutations", "3"), "3 permutations cannot make one head significant"),
    ):
        with pytest.raises(SystemExit) as left:
            run(model, given, tmp_path / "out", *options)
        assert left.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_checkpoints_are_refused(tmp_path, files, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"width": 4}}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit):
        run(tmp_path / "other.ckpt", files, tmp_path / "out")
    assert "is no checkpoint of MemoryLM: its hyper-parameters lack" in capsys.readouterr().err
