"""The data module: what a module receives, how it is cached, and that a resume changes nothing."""

import dataclasses
import json
import multiprocessing
import platform
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch

import datamodules.token_cache
from datamodules import CalibrationText
from datamodules.documents import Domain
from datamodules.packing import IGNORED, TextBatch
from datamodules.recall_sequences import Recall
from datamodules.tokenizers import ByteTokenizer, train_bpe
from theria.models.memory_lm import MemoryLM
from theria.tasks.recall import sample_recall

pytestmark = [
    # Python 3.12 warns of every fork in a process with threads, which PyTorch always is.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # These tests are about the CPU, also where there is a GPU.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # Lightning looks for this class in torch.utils._pytree at every batch transfer.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

EPOCHS, BATCHES = 2, 3
RECALL = Recall(
    min_pairs=2, max_pairs=4, queries=2, query_span=8, num_keys=16, num_values=8, num_val_sequences=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of short documents."""
    root = tmp_path_factory.mktemp("texts")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    for i in range(40):
        text = " ".join(words[(i * k) % 6] for k in range(1, 20))
        (root / f"{i:02}.txt").write_text(f"document {i}\n\n{text} {i}\n")
    lines = [json.dumps({"text": f"line {i} " + "na\u00efve " * (i % 7)}) for i in range(60)]
    (root / "lines.jsonl").write_text("\n".join(lines))
    return root


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "domains": {
            "files": Domain(files=[str(folder / "*.txt")]),
            "lines": Domain(files=[str(folder / "*.jsonl")], weight=0.5),
        },
        "sequence_length": 32,
        "batch_size": 4,
        "train_sequences_per_epoch": 4 * BATCHES,
        "val_sequences": 5,
        "recall": RECALL,
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": str(folder / "cache"),
        "seed": 3,
    } | changes


def ready(folder: Path, **changes: Any) -> CalibrationText:
    data = CalibrationText(**settings(folder, **changes))
    data.prepare_data()
    data.setup("fit")
    return data


def rows(batch: TextBatch) -> list[Any]:
    return [part.tolist() for part in batch]


class Recorder(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self, vocab_size: int = 281) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[list[Any]] = []
        self.evaluated: list[tuple[int, list[Any]]] = []

    def training_step(self, batch: TextBatch, batch_idx: int) -> torch.Tensor:
        self.trained.append(rows(batch))
        return self.parameter * batch.tokens.float().mean()

    def validation_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append((dataloader_idx, rows(batch)))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(pl.Callback):
    """A checkpoint after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(module.trained)}.ckpt", weights_only=False)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **({"max_epochs": EPOCHS} | options),
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_in_the_middle_of_an_epoch_goes_on_exactly(
    num_workers: int, folder: Path, tmp_path: Path
) -> None:
    whole = Recorder()
    data = CalibrationText(**settings(folder, num_workers=num_workers))
    trainer(Saver(tmp_path)).fit(whole, data)
    assert len(whole.trained) == EPOCHS * BATCHES
    assert len({str(batch) for batch in whole.trained}) == EPOCHS * BATCHES
    for done in range(1, EPOCHS * BATCHES):
        module = Recorder()
        again = CalibrationText(**settings(folder, num_workers=1 - num_workers))
        trainer().fit(module, again, ckpt_path=tmp_path / f"{done}.ckpt", weights_only=True)
        assert module.trained == whole.trained[done:]


class RollBackOnce(pl.Callback):
    """After `at` batches goes back to the state after `back` of them, and past the batches in between."""

    def __init__(self, back: int, at: int) -> None:
        self.back, self.at = back, at
        self.state: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        data = trainer.datamodule
        if len(module.trained) == self.back:
            self.state = data.state_dict()
        if len(module.trained) == self.at and self.state is not None:
            spike = data.train_dataloader().last_batch
            data.load_state_dict(self.state)
            data.skip_batches(range(spike - 1, spike + 1))
            self.state = None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_rollback_skips_the_batches_around_a_spike(num_workers: int, folder: Path, tmp_path: Path) -> None:
    options = settings(folder, num_workers=num_workers, train_sequences_per_epoch=32)
    whole = Recorder()
    trainer(max_epochs=1).fit(whole, CalibrationText(**options))
    module = Recorder()
    trainer(RollBackOnce(2, 5), Saver(tmp_path), max_epochs=1).fit(module, CalibrationText(**options))
    expected = [whole.trained[i] for i in (0, 1, 2, 3, 4, 2, 5, 6)]
    assert module.trained == expected
    # and a resume after it still knows
    resumed = Recorder()
    trainer(max_epochs=1).fit(
        resumed, CalibrationText(**options), ckpt_path=tmp_path / "6.ckpt", weights_only=True
    )
    assert resumed.trained == expected[6:]


def test_another_corpus_at_resume_is_warned_of(folder: Path, tmp_path: Path) -> None:
    trainer(Saver(tmp_path)).fit(Recorder(), CalibrationText(**settings(folder)))
    changed = settings(folder, domains={"lines": Domain(files=[str(folder / "*.jsonl")])})
    with pytest.warns(match=r"corpus_sha256 = '[0-9a-f]{64}' \(now '[0-9a-f]{64}'\)"):
        trainer().fit(
            Recorder(), CalibrationText(**changed), ckpt_path=tmp_path / "2.ckpt", weights_only=True
        )


def test_every_domain_and_recall_are_validated_by_name(folder: Path) -> None:
    data, module = CalibrationText(**settings(folder)), Recorder()
    runner = trainer(max_epochs=1)
    runner.fit(module, data)
    assert data.val_names == ("files", "lines", "recall")
    seen = {index: [batch for i, batch in module.evaluated if i == index] for index in range(3)}
    for index, name in enumerate(data.val_names):
        sources = {source for batch in seen[index] for source in batch[5]}
        assert sources == {data.sources.index(name)}
        assert sum(len(batch[0]) for batch in seen[index]) == (3 if name == "recall" else 5)
    module.evaluated.clear()
    runner.test(module, data, verbose=False)
    assert data.test_names == ("files", "lines", "recall", "recall_never_stored", "recall_previous_shard")
    for index, name in enumerate(data.test_names):
        batches = [batch for i, batch in module.evaluated if i == index]
        if name in data.domains:
            labels = [label for batch in batches for row in batch[1] for label in row if label != IGNORED]
            counts = data.record["domains"][name]["test"]
            assert len(labels) == counts["tokens"]
            assert sum(n for batch in batches for n in batch[4]) == counts["bytes"]
        else:
            shards = {s for batch in batches for row in batch[2] for s in row}
            assert shards == ({0, 1} if name == "recall_previous_shard" else {0})


def test_held_out_paragraphs_do_not_reach_training_batches(folder: Path) -> None:
    data = ready(folder)
    texts = {}
    for split in ("train", "validation", "test"):
        stream = data.corpus.streams["files"][split]
        pieces = stream.tokens.to(torch.int64).tensor_split(stream.starts[1:-1])
        texts[split] = [data.decode(piece.tolist()).removeprefix("<end>") for piece in pieces]
    paragraphs = {
        split: {p.strip() for t in found for p in t.split("\n\n")} for split, found in texts.items()
    }
    assert not paragraphs["train"] & (paragraphs["validation"] | paragraphs["test"])
    originals = {path.read_text() for path in folder.glob("*.txt")}
    assert {text for found in texts.values() for text in found} == originals


def test_what_was_read_is_recorded_and_reaches_the_loggers(folder: Path, tmp_path: Path) -> None:
    class Keeper(pl.loggers.CSVLogger):
        def log_hyperparams(self, params: Any) -> None:  # type: ignore[override]
            self.kept = dict(params)

    logger = Keeper(tmp_path)
    data = CalibrationText(**settings(folder))
    trainer(Saver(tmp_path), max_epochs=1, logger=logger, log_every_n_steps=1).fit(Recorder(), data)
    assert logger.kept["python_version"] == platform.python_version()
    assert logger.kept["corpus_sha256"] == data.record["corpus_sha256"]
    counts = logger.kept["corpus"]["lines"]
    assert sum(split["documents"] for split in counts.values()) == 60
    size = sum(
        len(json.loads(line)["text"].encode()) for line in (folder / "lines.jsonl").read_text().split("\n")
    )
    assert sum(split["bytes"] for split in counts.values()) == size
    for split, of_split in counts.items():
        assert of_split["tokens"] == of_split["bytes"] + of_split["documents"]
        assert data.bytes_per_token("lines", split) == of_split["bytes"] / of_split["tokens"]
        assert len(of_split["sha256"]) == 64
        assert (
            f"lines {split}: {of_split['documents']} documents, {of_split['bytes']} bytes" in data.summary()
        )
    # plain values only
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert saved["domains"]["lines"]["weight"] == 0.5
    assert saved["recall"]["min_pairs"] == 2


def test_tokens_are_cached_by_content(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = datamodules.token_cache.build_corpus
    monkeypatch.setattr(
        datamodules.token_cache, "build_corpus", lambda *a, **k: built.append(1) or build(*a, **k)
    )
    text = tmp_path / "a.jsonl"
    text.write_bytes((folder / "lines.jsonl").read_bytes())
    options = settings(folder, cache_dir=str(tmp_path / "cache"), domains={"a": Domain(files=[str(text)])})

    def hash_of(**changes: Any) -> str:
        data = CalibrationText(**options | changes)
        data.prepare_data()
        return str(data.record["corpus_sha256"])

    first = hash_of()
    assert [hash_of(), hash_of(seed=9, sequence_length=64)] == [first, first]
    assert len(built) == 1
    assert hash_of(val_fraction=0.3) != first
    assert len(built) == 2
    text.write_bytes(text.read_bytes().replace(b"line 7 ", b"line 8 "))
    assert hash_of() != first
    assert len(built) == 3
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 3
    assert {path.suffix for path in files} == {".safetensors"}
    for path in files:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cached tokens .* are damaged .*: delete the file"):
        hash_of()


def test_a_killed_write_leaves_no_cache_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(datamodules.token_cache, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            ready(folder, cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert ready(folder, cache_dir=str(tmp_path)).record["corpus_sha256"]


def build_in_process(options: dict[str, Any]) -> None:
    CalibrationText(**options).prepare_data()


def test_processes_may_build_the_same_cache_at_once(folder: Path, tmp_path: Path) -> None:
    options = settings(folder, cache_dir=str(tmp_path))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_in_process, args=(options,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "file"])
def test_bits_per_byte_do_not_depend_on_the_tokenizer(tokenizer: str, folder: Path, tmp_path: Path) -> None:
    """Bytes are counted in text, however it is cut into tokens."""
    name = tokenizer
    if tokenizer == "file":
        train_bpe([path.read_bytes() for path in folder.glob("*.txt")], 280, tmp_path / "t.json")
        name = str(tmp_path / "t.json")
    data = ready(folder, tokenizer=name, tokenizer_vocab_size=300, val_sequences=None)
    end = {"byte": 256, "bpe": 300, "file": 280}[tokenizer]
    assert data.end_token == end
    assert data.vocab_size == end + 1 + 16 + 8
    reference = ready(folder)
    for domain, loader in zip(data.val_names[:2], data.val_dataloader()[:2], strict=True):
        batches = list(loader)
        counts = data.record["domains"][domain]["validation"]
        assert counts["bytes"] == reference.record["domains"][domain]["validation"]["bytes"]
        assert counts["sha256"] == reference.record["domains"][domain]["validation"]["sha256"]
        assert sum(int(batch.num_bytes.sum()) for batch in batches) == counts["bytes"]
        labels = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        assert labels * data.bytes_per_token(domain) == pytest.approx(counts["bytes"])
        if tokenizer != "byte" and domain == "files":  # which "file" was trained on
            assert counts["tokens"] < 0.8 * reference.record["domains"][domain]["validation"]["tokens"]
    assert ready(folder, tokenizer=name, tokenizer_vocab_size=300).record == data.record


def test_a_trained_tokenizer_has_not_seen_held_out_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[bytes] = []

    def train(texts: Any, vocab_size: int, path: Path) -> Any:
        given.extend(texts)
        return ByteTokenizer()

    monkeypatch.setattr(datamodules.token_cache, "train_bpe", train)
    data = ready(folder, tokenizer="bpe", cache_dir=str(tmp_path))
    counts = data.record["domains"]
    assert sum(map(len, given)) == sum(counts[name]["train"]["bytes"] for name in counts)


def test_the_models_vocabulary_must_fit(folder: Path) -> None:
    data = CalibrationText(**settings(folder))
    for vocab in (280, 385, 32000):
        with pytest.raises(
            ValueError, match=rf"the model's vocab_size is {vocab}, but tokenizer 'byte' makes 281 "
        ):
            trainer(max_epochs=1).fit(Recorder(vocab), data)
    trainer(max_epochs=1).fit(Recorder(384), data)


def test_the_memory_language_model_takes_a_batch_and_learns_from_its_labels(folder: Path) -> None:
    torch.manual_seed(0)
    data = ready(folder)
    model = MemoryLM(data.vocab_size, width=16, blocks=1, heads=2, window=8, memory_heads=1, memory_dim=8)
    batch = next(iter(data.train_dataloader()))
    logits = model(batch.tokens, segment_ids=batch.segment_ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batches_of_one_process(world_size: int, folder: Path) -> None:
    def batches(rank: int, ranks: int) -> list[TextBatch]:
        data = CalibrationText(**settings(folder))
        progress = SimpleNamespace(total=SimpleNamespace(processed=0))
        data.trainer = SimpleNamespace(  # the parts of a Trainer that are looked at
            global_rank=rank,
            world_size=ranks,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        )
        data.setup("fit")
        return list(data.train_dataloader())

    alone = batches(0, 1)
    ranks = [batches(rank, world_size) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        order = torch.cat([rank[step].sample_ids for rank in ranks]).argsort()
        for name in TextBatch._fields:
            together = torch.cat([getattr(rank[step], name) for rank in ranks])[order]
            assert torch.equal(together, getattr(whole, name))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_recall_of_a_split_is_its_own_and_stands_in_text_of_that_split(split: str, folder: Path) -> None:
    data = ready(folder)
    loaders = {"validation": data.val_dataloader, "test": data.test_dataloader}[split]()
    (batch,) = loaders[2]
    assert data.recall_spec is not None
    drawn = sample_recall(data.recall_spec, torch.arange(3), seed=3, epoch=0, stream=split)
    assert torch.equal(batch.labels, drawn.labels)
    streams = [data.corpus.streams[name][split] for name in data.domains]
    # twice, as windows go on at the beginning
    text = " ".join(data.decode(2 * stream.tokens.tolist()) for stream in streams)
    pieces = [
        piece for row in batch.tokens.tolist() for piece in re.split(r"<(?:key|value) \d+>", data.decode(row))
    ]
    assert max(map(len, pieces)) > 8
    assert all(piece.strip("\ufffd") in text for piece in pieces)


def test_too_few_keys_for_a_control_are_said_before_a_test_begins(folder: Path) -> None:
    data = ready(folder, recall=dataclasses.replace(RECALL, num_keys=5))
    next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match=r"'never_stored' needs max_pairs \+ queries = 6 keys.* has 5"):
        data.test_dataloader()


def test_recall_may_stand_in_noise(folder: Path) -> None:
    data = ready(folder, recall=dataclasses.replace(RECALL, filler="noise"))
    (batch,) = data.val_dataloader()[2]
    filler = batch.tokens[batch.tokens < data.end_token]
    assert (filler >= 128).float().mean() > 0.3


def test_text_alone_has_no_recall_and_no_tokens_for_it(folder: Path) -> None:
    data = ready(folder, recall=None)
    assert data.vocab_size == 257
    assert data.val_names == data.test_names == ("files", "lines")
    assert len(data.val_dataloader()) == len(data.test_dataloader()) == 2
    batches = list(data.train_dataloader())
    assert not any(batch.recall_mask.any() for batch in batches)
    assert max(int(batch.tokens.max()) for batch in batches) <= 256


def test_decoding_names_what_is_no_text(folder: Path) -> None:
    data = ready(folder)
    assert (
        data.decode([104, 105, 256, 257, 272, 273, 280, 281, 33])
        == "hi<end><key 0><key 15><value 0><value 7><281>!"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "train_sequences_per_epoch = 12 is not a multiple of batch_size = 5"),
        ({"batch_size": 0}, r"batch_size must be in \[1, .*got 0"),
        ({"val_sequences": 0}, r"val_sequences must be in \[1, .*got 0"),
        ({"seed": -1}, r"seed must be in .*got -1"),
        ({"domains": {}}, "at least one domain"),
        ({"domains": {"recall": Domain(built_in="python_docs")}}, "not 'recall' or .*got 'recall'"),
        ({"domains": {"recall_notes": Domain(built_in="python_docs")}}, "in front, got 'recall_notes'"),
        ({"domains": {"a/b": Domain(built_in="python_docs")}}, "letters, digits, - and _.*got 'a/b'"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationText(**settings(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.5}, r"share of recall must be in \[0, 1\], got 1.5"),
        ({"filler": "silence"}, "filler of recall must be text or noise, got 'silence'"),
        ({"num_val_sequences": 0}, "num_val_sequences must be at least 1"),
    ],
)
def test_impossible_recall_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(**changes)


def test_errors_of_reading_name_the_domain(folder: Path) -> None:
    data = CalibrationText(**settings(folder, domains={"mine": Domain(files=["nowhere/*.txt"])}))
    with pytest.raises(ValueError, match=r"domain 'mine': no file matches 'nowhere/\*.txt'"):
        data.prepare_data()
    with pytest.raises(RuntimeError, match="read in setup"):
        _ = data.vocab_size


def test_settings_come_from_the_command_line(folder: Path) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CalibrationText, "data")
    config = {
        "domains": {"a": {"files": ["x/*.txt"], "weight": 2.0}, "prose": {"built_in": "python_docs"}},
        "recall": {"share": 0.5, "filler": "noise"},
        "cache_dir": str(folder),
    }
    data = parser.instantiate(
        parser.parse_args([f"--data={json.dumps(config)}", "--data.recall.max_pairs=32"])
    ).data
    assert data.domains == {
        "a": Domain(files=["x/*.txt"], weight=2.0),
        "prose": Domain(built_in="python_docs"),
    }
    assert data.recall == Recall(share=0.5, filler="noise", max_pairs=32)
    assert parser.instantiate(parser.parse_args(["--data.recall=null"])).data.recall is None
    assert parser.instantiate(parser.parse_args([])).data.recall == Recall()


def test_the_default_corpus_is_python_itself(tmp_path: Path) -> None:
    data = CalibrationText(cache_dir=str(tmp_path))
    data.prepare_data()
    counts = data.record["domains"]
    assert set(counts) == {"prose", "sources"}
    assert 300_000 < sum(split["bytes"] for split in counts["prose"].values()) < 1_000_000
    assert sum(split["bytes"] for split in counts["sources"].values()) > 5_000_000
    data.setup("fit")
    assert data.vocab_size == 257 + 128 + 64
    batch = next(iter(data.train_dataloader()))
    assert batch.source.bincount(minlength=3).tolist() == [3, 3, 2]
    answers = batch.recall_mask.sum(1)
    assert answers[batch.source == 2].tolist() == [8, 8]
