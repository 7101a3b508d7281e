"""What the needle probe reports, that training does not notice it, and what it says of memories that fail."""

import contextlib
import copy
import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from forked_runs import Run, in_forks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from callbacks import MetricsJSONL, NIAHProbe, ResumableCheckpoint, RNGState, read_metrics
from callbacks.rng_state import collect_rng_state
from datamodules import CalibrationText
from datamodules.documents import Domain
from datamodules.recall_sequences import Recall
from lightning_modules import MemoryLM
from lightning_modules.loggers import RunTensorBoardLogger
from theria.memory.needle import draw_haystack, memory_branches, probe_memories
from theria.tasks.recall import IGNORED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # the tests are about numbers, not about how many processes read the data
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    # a test has a module in a mode of its own
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode"),
    # models of a few steps fail, and say so
    pytest.mark.filterwarnings("ignore:NIAHProbe. at step"),
]

ROOT = Path(__file__).parents[2]
SMALL = {"pairs": 4, "capacity": [2, 4, 8], "repetitions": 3, "prompts": 3, "controls": 2}
SMALL |= {"prompt_pairs": 4, "queries": 2, "depths": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = (f"the cat sat on mat {number} {line * number}" for line in range(6))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def data(corpus: Path, **changes: Any) -> CalibrationText:
    recall = Recall(share=0.5, min_pairs=2, max_pairs=4, queries=2, query_span=6, num_val_sequences=2)
    options = {
        "domains": {"prose": Domain(files=[f"{corpus}/*.txt"])},
        "sequence_length": 32,
        "batch_size": 4,
        "train_sequences_per_epoch": 24,
        "val_sequences": 2,
        "recall": recall,
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": str(corpus / "cache"),
    }
    return CalibrationText(**(options | changes))


def module(**changes: Any) -> MemoryLM:
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "window": 4, "memory_dim": 8, "slots": 4, "chunk_size": 8}
    built = MemoryLM(**(sizes | {"sample_tokens": 0} | changes))
    if changes.get("memory_heads") != 0:
        # what draws random numbers in training, and must not in a probe
        for block in built.model.blocks:
            block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.1))
    return built


def trainer(*callbacks: Callback, **changes: Any) -> Trainer:
    options = {
        "accelerator": "cpu",
        "max_steps": 6,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "callbacks": list(callbacks),
    }
    return Trainer(**(options | changes))


class Watcher(Callback):
    """Everything that training goes on from, after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        rng = collect_rng_state()  # of which Python's is drawn from by the tests' own shape checks
        found = {"torch": rng["torch"], "numpy": rng["numpy"][0], "at": torch.tensor(rng["numpy"][1])}
        found |= {f"cuda {i}": state for i, state in enumerate(rng.get("cuda", []))}
        found |= {name: value.clone() for name, value in pl_module.state_dict().items()}
        for name, parameter in pl_module.named_parameters():
            found[f"gradient of {name}"] = parameter.grad.clone()
            for key, value in trainer.optimizers[0].state[parameter].items():
                found[f"{key} of {name}"] = value.clone()
        found["modes"] = torch.tensor([part.training for part in pl_module.modules()])
        self.seen.append(found)


def seen_by_training(corpus: Path, *probes: Callback, **changes: Any) -> list[dict[str, torch.Tensor]]:
    watcher = Watcher()
    fitted = module()
    fitted.model.blocks[1].norm.eval()  # a mode of its own, to be found again
    torch.manual_seed(1)
    trainer(*probes, watcher, **changes).fit(fitted, datamodule=data(corpus))
    return watcher.seen


def assert_same(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> None:
    assert len(first) == len(second) == 6
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_identical_with_and_without_it(corpus, precision):
    alone = seen_by_training(corpus, precision=precision)
    probe = NIAHProbe(every_n_steps=1, **SMALL)
    probed = seen_by_training(corpus, probe, precision=precision)
    assert probe.last.step == 6
    assert_same(alone, probed)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_identical_with_and_without_it_on_cuda(corpus, precision):
    options = {"accelerator": "cuda", "devices": 1, "precision": precision}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            alone = seen_by_training(corpus, **options)
            again = seen_by_training(corpus, **options)
            assert_same(alone, again)
            assert_same(alone, seen_by_training(corpus, NIAHProbe(every_n_steps=1, **SMALL), **options))
    finally:
        torch.use_deterministic_algorithms(False)


class Copies(Callback):
    """The module as a probe at the end of each step sees it."""

    def __init__(self) -> None:
        self.models: list[MemoryLM] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.models.append(copy.deepcopy(pl_module.model).eval())


def test_figures_reach_records_and_loggers(corpus, tmp_path):
    logger, probe, copies = RunTensorBoardLogger(str(tmp_path)), NIAHProbe(2, **SMALL), Copies()
    callbacks = [copies, probe, MetricsJSONL()]
    trainer(*callbacks, logger=logger, max_steps=5).fit(module(), datamodule=data(corpus))
    table = read_metrics(tmp_path / "metrics.jsonl").set_index("step")
    assert table["niah_cosine"].notna().tolist() == [False, True, False, True, False]
    assert table["niah_accuracy"].notna().tolist() == [False, True, False, True, False]

    model = copies.models[3]
    branches = memory_branches(model)
    hay = draw_haystack(3, 1, 8, 8, seed=0)
    expected = {pairs: probe_memories(branches, hay, pairs=pairs) for pairs in (2, 4, 8)}
    assert table["niah_cosine"][4] == expected[4].cosine.value == probe.last.memory.cosine.value
    assert probe.last.capacity == tuple(expected.values())
    right = asked = 0
    for made in probe._asked:
        stored = made.control == 0
        with torch.no_grad():
            logits = model(made.tokens[stored], segment_ids=made.segment_ids[stored]).logits
        labels = made.labels[stored]
        right += int((logits.argmax(-1) == labels).sum())
        asked += int((labels != IGNORED).sum())
    assert table["niah_accuracy"][4] == right / asked == probe.last.prompts.accuracy.value
    assert asked == 2 * 3 * 2

    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0}).Reload()
    scalars = {tag for tag in events.Tags()["scalars"] if tag.startswith("niah/")}
    assert {event.step for tag in scalars for event in events.Scalars(tag)} == {1, 3}
    names = {"accuracy", "accuracy_low", "accuracy_high", "chance", "seconds"}
    names |= {f"accuracy_{control}" for control in ("memory_off", "never_stored", "previous_shard")}
    names |= {"cosine", "cosine_low", "cosine_high", "cosine_worst", "cosine_theory", "cosine_never_stored"}
    names |= {f"cosine_at_{pairs}" for pairs in (2, 4, 8)} | {"accuracy_depth_1", "accuracy_depth_2"}
    assert scalars == {f"niah/{name}" for name in names}
    assert events.Scalars("niah/cosine")[1].value == pytest.approx(expected[4].cosine.value)
    for tag in ("niah/heat_map", "niah/capacity"):
        assert [image.step for image in events.Images(tag)] == [1, 3]
        assert events.Images(tag)[0].width > 100


def test_prompts_are_of_the_data_s_text_and_beyond_reach(corpus):
    probe = NIAHProbe(**SMALL)
    trainer(probe).fit(module(), datamodule=data(corpus))
    reach = 2 * 3
    assert [made.length for made in probe._asked] == [(reach + 4 + 8 + 32) // 2, 32]
    for made in probe._asked:
        filler = made.tokens[made.tokens < 256]
        assert set(bytes(filler.tolist()).decode()) <= set("the cat sat on mat 0123456789\n")
        assert (made.depth >= 0).sum() == (3 + 2) * 2
    given = NIAHProbe(lengths=[64, 48], **SMALL)
    trainer(given).fit(module(), datamodule=data(corpus))
    assert [made.length for made in given._asked] == [64, 48]


def test_prompts_are_validation_s_of_the_probe_s_own_seed(corpus):
    def asked(probe_seed: int, **changes: Any) -> list[torch.Tensor]:
        probe = NIAHProbe(1, seed=probe_seed, **SMALL)
        trainer(probe, max_steps=1).fit(module(), datamodule=data(corpus, **changes))
        assert not probe._fields  # without records there is nobody to take them
        return [*(made.tokens for made in probe._asked), probe._haystack.keys]

    first, again, other = asked(0), asked(0, seed=7), asked(1)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    source = data(corpus)
    source.setup("fit")
    reach, shape = 6, {"min_pairs": 4, "max_pairs": 4, "queries": 2, "query_span": 4}
    spec = dataclasses.replace(source.recall_spec, min_distance=reach, **shape)
    drawn = dataclasses.replace(source.recall_source("validation"), spec=spec, seed=0)
    tokens, _, _ = drawn.sample(0, torch.arange(3))
    assert torch.equal(first[1][:3], tokens)


def test_it_probes_in_the_precision_of_training(corpus):
    class Precision(Callback):
        seen: list[torch.dtype]

        def on_fit_start(self, trainer, pl_module) -> None:
            def note(block, inputs, output) -> None:
                if not block.training:
                    self.seen.append(output.dtype)

            self.seen = []
            pl_module.model.blocks[0].o_proj.register_forward_hook(note)

    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        probed = Precision()
        callbacks = [NIAHProbe(1, **SMALL), probed]
        trainer(*callbacks, max_steps=1, precision=precision).fit(module(), datamodule=data(corpus))
        assert set(probed.seen) == {dtype}


def test_a_resumed_run_probes_as_the_uninterrupted_one(corpus, tmp_path):
    def fit(name: str, steps: int, start: Path | None = None) -> Any:
        checkpoint = ResumableCheckpoint(every_n_steps=3, dirpath=str(tmp_path / name))
        callbacks = [RNGState(), NIAHProbe(2, **SMALL), MetricsJSONL(), checkpoint]
        options = {"logger": RunTensorBoardLogger(str(tmp_path / name)), "enable_checkpointing": True}
        runner = trainer(*callbacks, max_steps=steps, **options)
        runner.fit(module(), datamodule=data(corpus), ckpt_path=start, weights_only=True)
        return read_metrics(tmp_path / name / "metrics.jsonl").set_index("step")

    whole = fit("whole", 6)
    for cut in (3, 4):
        fit(f"cut{cut}", cut)
        resumed = fit(f"cut{cut}", 6, tmp_path / f"cut{cut}" / f"step_{cut:06d}.ckpt")
        for name in ("niah_cosine", "niah_accuracy", "loss"):
            assert resumed[name].equals(whole[name])


def stub(step: int, *, first_rank: bool = True) -> Any:
    return SimpleNamespace(global_step=step, is_global_zero=first_rank)


def test_it_is_due_where_steps_pass_a_multiple_and_not_where_a_rollback_goes_back(monkeypatch):
    probe = NIAHProbe(every_n_steps=10)
    probed: list[int] = []

    def note(step: int) -> Any:
        probed.append(step)
        raise InterruptedError

    monkeypatch.setattr(probe, "probe", note)
    plugin = SimpleNamespace(forward_context=torch.no_grad)

    def end(step: int, **options: Any) -> None:
        runner = stub(step, **options)
        runner.precision_plugin = plugin
        with contextlib.suppress(InterruptedError):
            probe.on_train_batch_end(runner, torch.nn.Identity(), None, None, 0)

    probe.on_train_start(stub(8), None)
    for step in (8, 9, 10, 10, 11, 25, 12, 13, 19, 20, 20):
        end(step)
    assert probed == [10, 25, 20]
    end(30, first_rank=False)
    assert probed == [10, 25, 20]


def test_what_falls_short_is_warned_of_with_its_figures_and_training_goes_on(corpus):
    fitted = module()
    with pytest.warns(UserWarning, match=r"NIAHProbe: at step") as said:
        trainer(NIAHProbe(3, **SMALL)).fit(fitted, datamodule=data(corpus))
    told = [str(warning.message) for warning in said if "NIAHProbe" in str(warning.message)]
    assert fitted.trainer.global_step == 6
    assert [message.split(" a ")[0].split(" of ")[0] for message in told] == [
        f"NIAHProbe: at step {step}" for step in (3, 3, 6, 6)
    ]
    memory, prompts = told[2:]
    for part in ("among 4 pairs", "in the worst head, expected 0.8 (theory", "a key never stored reads"):
        assert part in memory
    for part in ("answered 0.", "memory_off", "never_stored", "previous_shard", "expected 0.8", "0.016 in"):
        assert part in prompts


def test_nothing_is_said_where_all_is_well(corpus):
    options = SMALL | {"threshold": 0.01, "repetitions": 16, "pairs": 2, "prompts": 0}
    probe = NIAHProbe(3, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(probe).fit(module(memory_dim=64), datamodule=data(corpus))
    assert probe.last.memory.worst > 0.5
    assert not [warning for warning in said if "NIAHProbe" in str(warning.message)]


def test_without_prompts_the_memory_level_stands_alone(corpus, tmp_path):
    probe = NIAHProbe(2, **(SMALL | {"prompts": 0}))
    logger = RunTensorBoardLogger(str(tmp_path))
    text_alone = data(corpus, recall=None)
    callbacks = [probe, MetricsJSONL()]
    trainer(*callbacks, logger=logger, max_steps=2).fit(module(vocab_size=257), datamodule=text_alone)
    assert probe.last.prompts is None
    table = read_metrics(tmp_path / "metrics.jsonl")
    assert table["niah_cosine"].notna().sum() == 1
    assert "niah_accuracy" not in table


@pytest.mark.slow
def test_two_processes_are_probed_by_the_first(tmp_path):
    """The second one waits for nothing, and both end the run."""
    settings: Any = yaml.safe_load((ROOT / "configs" / "memory_lm.yaml").read_text())
    sizes = {"width": 16, "heads": 2, "window": 6, "memory_dim": 8, "slots": 4, "chunk_size": 8}
    settings["model"]["init_args"] |= sizes
    settings["data"]["init_args"]["sequence_length"] = 64
    settings["data"]["init_args"]["recall"] |= {"max_pairs": 8, "query_span": 16}
    options = {"max_steps": 4, "limit_val_batches": 0, "enable_progress_bar": False, "devices": 2}
    settings["trainer"] |= {**options, "accelerator": "cpu", "strategy": "ddp"}
    settings["trainer"]["callbacks"] = [
        {"class_path": "NIAHProbe", "init_args": {"every_n_steps": 2}},
        {"class_path": "MetricsJSONL"},
    ]
    (tmp_path / "ddp.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["fit", "--config", str(tmp_path / "ddp.yaml"), "--save_dir", str(tmp_path), "--name", "ddp"]
    said = in_forks(tmp_path, [Run("ddp", arguments, processes=2)])["ddp"]
    assert said.count("NIAHProbe: at step 2 of the needles in prompts") == 1
    table = read_metrics(tmp_path / "ddp" / "version_0" / "metrics.jsonl")
    assert table["niah_accuracy"].notna().tolist() == [False, True, False, True]


class Other(LightningModule):
    """A module without a language model."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training must not begin")

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("fitted", "changes", "options", "message"),
    [
        (Other, {}, {}, "Other has none: leave the callback out"),
        (lambda: module(memory_heads=0), {}, {}, "MemoryLM has none: leave the callback out"),
        (lambda: module(vocab_size=257), {"recall": None}, {}, "set prompts to 0 for the memory level alone"),
        (module, {"sequence_length": 32}, {"prompt_pairs": 12}, "more than 34 tokens.*have 32: give lengths"),
        (module, {}, {"lengths": [20, 17]}, "no prompts: 2 queries need 4 .* length 17 leaves"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_training(corpus, fitted, changes, options, message):
    with pytest.raises(MisconfigurationException, match=message) as raised:
        trainer(NIAHProbe(**(SMALL | options))).fit(fitted(), datamodule=data(corpus, **changes))
    assert "\n" not in str(raised.value)


def test_records_come_after_it(corpus, tmp_path):
    logger = RunTensorBoardLogger(str(tmp_path))
    with pytest.raises(MisconfigurationException, match="has to stand before MetricsJSONL"):
        trainer(MetricsJSONL(), NIAHProbe(**SMALL), logger=logger).fit(module(), datamodule=data(corpus))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every_n_steps": 0}, ValueError),
        ({"every_n_steps": 1.5}, TypeError),
        ({"threshold": 0.0}, ValueError),
        ({"pairs": 0}, ValueError),
        ({"capacity": [10, 0]}, ValueError),
        ({"repetitions": 1}, ValueError),
        ({"prompts": -1}, ValueError),
        ({"controls": 0}, ValueError),
        ({"controls": 9}, ValueError),
        ({"lengths": []}, ValueError),
        ({"lengths": [64, 64]}, ValueError),
        ({"depths": 0}, ValueError),
        ({"seed": -1}, ValueError),
    ],
)
def test_impossible_settings_are_refused(options, error):
    with pytest.raises(error):
        NIAHProbe(**options)
