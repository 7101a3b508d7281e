"""What the callback reports, and that training does not notice it."""

import copy
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import InterferenceHeatmap
from callbacks.rng_state import collect_rng_state
from datamodules import CalibrationText, SyntheticSeqCls
from datamodules.documents import Domain
from datamodules.loader import BatchIndex
from datamodules.packing import TextBatch
from datamodules.recall_sequences import Recall
from lightning_modules import MemoryLM, MetaSeqClassifier
from theria.interference import Ridge, compute
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

CLASSES = {"length": 6, "width": 8, "num_classes": 3, "num_signal_positions": 2}
SIZES = CLASSES | {"support_size": 4, "query_size": 5}
RECALL = {"share": 0.5, "min_pairs": 2, "max_pairs": 4, "queries": 2, "query_span": 6, "num_val_sequences": 6}
KINDS = ("text", "classes")

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # the tests are about numbers, not about how many processes read the data
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    # on purpose: every module is to come back in the mode that it was in
    pytest.mark.filterwarnings("ignore:Found 4 module"),
]


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {name: float(value) for name, value in metrics.items()}))

    def of(self, prefix: str) -> list[tuple[int, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if any(name.startswith(prefix) for name in row)]


class Watcher(Callback):
    """Weights, gradients, generators and modes after every step."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []
        self.modes: list[list[bool]] = []
        self.models: list[torch.nn.Module] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        model = pl_module.model
        self.models.append(copy.deepcopy(model))
        self.modes.append([module.training for module in pl_module.modules()])
        state = collect_rng_state()  # of which Python's is drawn from by the tests' own shape checks
        self.seen.append(
            [
                *(p.detach().clone() for p in model.parameters()),
                *(torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()),
                state["torch"],
                state["numpy"][0],
                torch.tensor([state["numpy"][1]]),
            ]
        )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two domains of small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, word in (("prose", "the cat sat on mat"), ("code", "def f(x): return x")):
        (folder / domain).mkdir()
        for number in range(40):
            lines = (f"{word} {number} {line * number}" for line in range(6))
            (folder / domain / f"{number}.txt").write_text("\n".join(lines))
    return folder


def text_data(corpus, *domains):
    names = domains or ("prose", "code")
    return CalibrationText(
        domains={name: Domain(files=[f"{corpus}/{name}/*.txt"]) for name in names},
        sequence_length=32,
        batch_size=4,
        train_sequences_per_epoch=40,
        val_sequences=None,
        recall=Recall(**RECALL),
        val_fraction=0.2,
        test_fraction=0.2,
        cache_dir=str(corpus / "cache"),
    )


def parts(kind, corpus, dropout=0.2):
    """A module and its data."""
    seed_everything(0, verbose=False)
    if kind == "text":
        sizes = {"width": 16, "heads": 2, "window": 4, "memory_dim": 8, "slots": 4, "chunk_size": 8}
        module = MemoryLM(**sizes, dropout=dropout, sample_tokens=0, backend="reference")
        module.model.blocks[1].mlp.eval()  # a module that is not in the mode of the others
        return module, text_data(corpus)
    module = MetaSeqClassifier(width=8, num_classes=3, inner_steps=2, backend="reference")
    return module, SyntheticSeqCls(**SIZES, meta_batch_size=4, train_tasks_per_epoch=32)


def trainer_of(callbacks, *, steps, logger, **changes):
    options = {
        "accelerator": "cpu",
        "max_steps": steps,
        "limit_val_batches": 0,
        "inference_mode": False,
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=callbacks, logger=logger, **(options | changes))


def fit(kind, corpus, *callbacks, steps=5, ckpt_path=None, dropout=0.2, **changes):
    module, data = parts(kind, corpus, dropout)
    logger = Memory()
    trainer = trainer_of(list(callbacks), steps=steps, logger=logger, **changes)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, module, logger


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without_it(kind, corpus):
    alone, watched, after = Watcher(), Watcher(), Watcher()
    _, plain, without = fit(kind, corpus, alone)
    _, probed, logged = fit(kind, corpus, watched, InterferenceHeatmap(every_n_steps=2, samples=3))
    # the state after a step that was probed is seen before the next step
    fit(kind, corpus, InterferenceHeatmap(every_n_steps=1, samples=3), after)
    for other in (watched, after):
        assert len(alone.seen) == len(other.seen) == 5
        for expected, found in zip(alone.seen, other.seen, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
        assert alone.modes == other.modes
    assert [m.training for m in plain.modules()] == [m.training for m in probed.modules()]
    if kind == "text":
        assert {True, False} == set(alone.modes[0])
    for p, q in zip(plain.parameters(), probed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)
    losses = [[row["train/loss"] for _, row in log.of("train/loss")] for log in (without, logged)]
    assert losses[0] == losses[1] != []


class RankRecorder(Callback):
    """What a process saw in the end: its weights, and the steps at which it logged scores."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            # a process that had waited for the other in vain would not come here
            weights = [p.detach().clone() for p in pl_module.parameters()]
            steps = [step for step, _ in trainer.logger.of("interference/")] if trainer.loggers else []
            torch.save({"weights": weights, "steps": steps}, self.folder / f"rank-{trainer.global_rank}.pt")


# Lightning's own use of it, in all_gather
@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated:FutureWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a process that used CUDA cannot")
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_of_two_processes_measures_and_training_does_not_notice(kind, corpus, tmp_path):
    found = {}
    for way, callbacks in (("without", []), ("with", [InterferenceHeatmap(every_n_steps=1, samples=2)])):
        folder = tmp_path / way
        folder.mkdir()
        options = {"devices": 2, "strategy": "ddp_fork", "steps": 3}
        fit(kind, corpus, *callbacks, RankRecorder(folder), **options)
        found[way] = [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]
    for rank in range(2):
        for way in found:
            pairs = zip(found["without"][0]["weights"], found[way][rank]["weights"], strict=True)
            assert all(torch.equal(p, q) for p, q in pairs)
    assert [saw["steps"] for saw in found["without"]] == [[], []]
    assert found["with"][0]["steps"] == [0, 1, 2]
    assert found["with"][1]["steps"] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_steps": 2}, [1, 3, 4]),
        ({"every_n_steps": 2, "at_fit_end": False}, [1, 3]),
        ({}, [4]),
        ({"every_n_steps": 5}, [4]),
    ],
)
def test_it_measures_every_n_steps_and_at_the_end_once(kind, options, steps, corpus):
    _, _, logger = fit(kind, corpus, InterferenceHeatmap(samples=2, variants=["signed"], **options))
    assert [step for step, _ in logger.of("interference/")] == steps
    assert set(steps) <= {step for step, _ in logger.of("train/")}


def text_samples(corpus, count, length):
    data = text_data(corpus)
    data.setup("fit")
    found = []
    for loader in data.val_dataloader()[:2]:
        size = loader.shard.num_items
        assert size > count
        places = [round(k * (size - 1) / (count - 1) - 0.499) for k in range(count)]
        windows = [loader.dataset[BatchIndex(0, range(place, place + 1))] for place in places]
        found.append(
            [(w.tokens[0, :length], w.labels[0, :length], w.segment_ids[0, :length]) for w in windows]
        )
    return found


def text_loss(model, sample):
    tokens, labels, segments = (part[None] for part in sample)
    return F.cross_entropy(model(tokens, segment_ids=segments).logits[0], labels[0], ignore_index=-100)


def class_samples(count, seed):
    batch = sample_tasks(SeqClsSpec(**SIZES), torch.arange(2), seed=seed, epoch=0, stream="validation")
    x = torch.cat((batch.support_x, batch.query_x), dim=1)
    y = torch.cat((batch.support_y, batch.query_y), dim=1)
    return [[(x[task, k], y[task, k]) for k in range(count)] for task in range(2)]


def class_loss(model, sample):
    return F.cross_entropy(model(sample[0][None]), sample[1][None])


@pytest.mark.parametrize("kind", KINDS)
def test_its_numbers_are_those_of_the_library(kind, corpus):
    watcher, options = (
        Watcher(),
        {"samples": 4, "max_tokens": 20, "fisher": "pooled", "ridge": 0.1, "seed": 5},
    )
    _, _, logger = fit(kind, corpus, watcher, InterferenceHeatmap(every_n_steps=3, **options), steps=3)
    ((_, row),) = logger.of("interference/")
    model = watcher.models[2].eval()
    samples = text_samples(corpus, 4, 20) if kind == "text" else class_samples(4, 5)
    loss = text_loss if kind == "text" else class_loss
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer than")
        found = compute(model, loss, *samples, fisher="pooled", ridge=Ridge("relative", 0.1))
    for block in "QKVO" if kind == "text" else "QKV":
        for variant in ("directional", "signed", "symmetric"):
            expected = np.mean(found.scores[variant][block])
            assert row[f"interference/{variant}_{block}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        negative = (found.scores["signed"][block] < 0).mean()
        assert row[f"interference/negative_share_{block}"] == pytest.approx(negative, abs=0.02)
        share = found.diagnostics[block].ridge_share.mean()
        assert row[f"interference/ridge_share_{block}"] == pytest.approx(share, abs=1e-3)
    assert 0 < row["interference/probe_seconds"] < 30
    assert 0 < row["interference/probe_share"] < 1
    assert np.mean(found.scores["symmetric"]["Q"]) > 0


def test_windows_without_a_label_are_no_samples():
    def window(places):
        labels = torch.tensor([[-100, -100, -100 if places.start == 1 else 7, 7]])
        whole = torch.zeros(1, 4, dtype=torch.int64)
        one = torch.zeros(1, dtype=torch.int64)
        return TextBatch(whole, labels, whole, whole.bool(), one, one, torch.tensor([places.start]))

    dataset = type("Windows", (), {"__getitem__": lambda _, index: window(index.ids)})()
    loader = SimpleNamespace(shard=SimpleNamespace(num_items=3), dataset=dataset)
    found = InterferenceHeatmap(samples=5, max_tokens=3)._windows(loader, torch.device("cpu"))
    assert [int(kept.sample_ids) for kept in found] == [0, 2]
    assert all(kept.tokens.shape == (1, 3) for kept in found)


def test_the_budget_and_the_device_reach_the_library(corpus, monkeypatch):
    given = {}

    def noting(*args, **options):
        given.update(options)
        return compute(*args, **options)

    monkeypatch.setattr("callbacks.interference_heatmap.compute", noting)
    fit("classes", corpus, InterferenceHeatmap(samples=2, memory_mib=3.5, fisher="pooled"), steps=1)
    assert (given["memory_budget_mib"], given["computation_device"]) == (3.5, "cpu")


def test_the_share_of_time_is_that_of_all_measurements(corpus, monkeypatch):
    clock = iter(range(1000))
    # every look at the clock is a second later
    monkeypatch.setattr(
        "callbacks.interference_heatmap.time", SimpleNamespace(perf_counter=lambda: next(clock))
    )
    callback = InterferenceHeatmap(every_n_steps=1, samples=2, variants=["signed"])
    _, _, logger = fit("classes", corpus, callback, steps=3)
    rows = [row for _, row in logger.of("interference/")]
    assert [row["interference/probe_seconds"] for row in rows] == [1, 1, 1]
    # training starts at 0, and each measurement looks twice
    assert [row["interference/probe_share"] for row in rows] == pytest.approx([1 / 2, 2 / 4, 3 / 6])


def test_domains_can_be_chosen(corpus):
    both, swapped = (
        fit("text", corpus, InterferenceHeatmap(samples=2, fisher="a", tasks=tasks), steps=1)[2]
        for tasks in (["prose", "code"], ["code", "prose"])
    )
    _, _, first = fit("text", corpus, InterferenceHeatmap(samples=2, fisher="a"), steps=1)
    value = [log.of("interference/")[0][1]["interference/directional_V"] for log in (both, swapped, first)]
    assert value[0] == value[2]
    assert value[0] != pytest.approx(value[1], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_measures_what_the_uninterrupted_one_does(kind, corpus, tmp_path):
    make = partial(InterferenceHeatmap, every_n_steps=2, samples=2)
    # dropout goes on exactly with RNGState only
    _, whole, expected = fit(kind, corpus, make(), steps=4, dropout=0.0)
    trainer, _, _ = fit(kind, corpus, make(), steps=3, dropout=0.0)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert not torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    _, resumed, found = fit(kind, corpus, make(), steps=4, ckpt_path=tmp_path / "half.ckpt", dropout=0.0)
    last = {name: value for name, value in expected.of("interference/")[-1][1].items() if "probe" not in name}
    ((step, row),) = found.of("interference/")
    assert step == 3
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert {name: value for name, value in row.items() if "probe" not in name} == last


@pytest.mark.parametrize("kind", KINDS)
def test_heat_maps_are_in_tensorboard(kind, corpus, tmp_path):
    module, data = parts(kind, corpus)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    callback = InterferenceHeatmap(every_n_steps=2, samples=2, variants=["signed", "symmetric"])
    trainer_of([callback], steps=3, logger=logger).fit(module, datamodule=data)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    tags = {tag for tag in events.Tags()["images"] if tag.startswith("interference/")}
    assert tags == {"interference/signed", "interference/symmetric"}
    assert [image.step for image in events.Images("interference/signed")] == [1, 2]
    assert [scalar.step for scalar in events.Scalars("interference/signed_Q")] == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_it_measures_in_the_precision_of_training(kind, corpus):
    rows = []
    for precision in ("32-true", "bf16-mixed"):
        callback = InterferenceHeatmap(samples=2, variants=["symmetric"])
        _, _, logger = fit(kind, corpus, callback, steps=1, precision=precision)
        rows.append(logger.of("interference/")[0][1]["interference/symmetric_V"])
    assert rows[0] != rows[1]
    assert rows[0] == pytest.approx(rows[1], rel=0.2)


class Other(LightningModule):
    """A module without a model that is known."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training must not begin")

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


def test_modules_and_data_without_what_it_measures_are_refused_before_training(corpus):
    text, language = parts("text", corpus)
    classifier, tasks = parts("classes", corpus)
    one = text_data(corpus, "prose")
    for module, data, callback, message in (
        (Other(), tasks, InterferenceHeatmap(), "Other has none such: leave the callback out"),
        (classifier, tasks, InterferenceHeatmap(tasks=["a", "b"]), "takes no names of tasks"),
        (text, one, InterferenceHeatmap(), r"CalibrationText has \['prose'\], asked for is the first two"),
        (
            text,
            language,
            InterferenceHeatmap(tasks=["prose", "recall"]),
            r"asked for is \['prose', 'recall'\]",
        ),
    ):
        trainer = trainer_of([callback], steps=1, logger=False)
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(module, datamodule=data)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "at least 1"),
        ({"every_n_steps": 1.5}, TypeError, "must be an int"),
        ({"at_fit_end": False}, ValueError, "leave the callback out for never"),
        ({"samples": 0}, ValueError, "samples must be"),
        ({"max_tokens": True}, ValueError, "max_tokens must be"),
        ({"tasks": ["a"]}, ValueError, "two domains"),
        ({"tasks": ["a", "a"]}, ValueError, "two domains"),
        ({"fisher": "b"}, ValueError, "fisher must be"),
        ({"variants": ["full"]}, ValueError, "variants must be"),
        ({"ridge": -1.0}, ValueError, "ridge value"),
        ({"memory_mib": 0}, ValueError, "memory_mib must be"),
    ],
)
def test_impossible_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        InterferenceHeatmap(**options)
