"""The training of the memory language model: what a step does, what validation measures, what is refused."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from datamodules import CalibrationText
from datamodules.documents import Domain
from datamodules.recall_sequences import Recall
from lightning_modules import MemoryLM, WarmupCosine
from lightning_modules.loggers import RunTensorBoardLogger
from lightning_modules.memory_lm import Polarization
from theria.memory import polarization_loss
from theria.models.flops import training_flops_per_token

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # the tests are about numbers, not about how many processes read the data
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]

RECALL = {"share": 0.5, "min_pairs": 2, "max_pairs": 4, "queries": 2, "query_span": 6, "num_val_sequences": 6}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, word in (("prose", "the cat sat on mat"), ("code", "def f(x): return x")):
        (folder / domain).mkdir()
        for number in range(40):
            lines = (f"{word} {number} {line * number}" for line in range(6))
            (folder / domain / f"{number}.txt").write_text("\n".join(lines))
    return folder


def data(corpus: Path, **changes: Any) -> CalibrationText:
    options = {
        "domains": {name: Domain(files=[f"{corpus}/{name}/*.txt"]) for name in ("prose", "code")},
        "sequence_length": 32,
        "batch_size": 4,
        "train_sequences_per_epoch": 40,
        "val_sequences": 6,
        "recall": Recall(**RECALL),
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "cache_dir": str(corpus / "cache"),
    }
    return CalibrationText(**(options | changes))


def module(**changes: Any) -> MemoryLM:
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "window": 4, "memory_dim": 8, "slots": 4, "chunk_size": 8}
    return MemoryLM(**(sizes | {"sample_tokens": 0} | changes))


def trainer(**changes: Any) -> Trainer:
    options = {
        "accelerator": "cpu",
        "max_steps": 3,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**(options | changes))


def training_batches(corpus: Path, count: int) -> list[Any]:
    source = data(corpus)
    source.setup("fit")
    return [batch for batch, _ in zip(source.train_dataloader(), range(count), strict=False)]


def test_a_fit_is_adamw_on_the_losses_with_a_schedule(corpus):
    schedule = Polarization(steps=3, initial=0.5, final=0.1, hold=0.0, shape="linear")
    fitted = module(
        recall_weight=0.7,
        polarization=schedule,
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, warmup_steps=1, total_steps=5),
    )
    model, rows = copy.deepcopy(fitted.model), []
    fitted.step_metrics.subscribe(rows.extend)
    trainer(gradient_clip_val=0.5).fit(fitted, datamodule=data(corpus))

    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    cosine = WarmupCosine(adamw, warmup_steps=1, total_steps=5)
    for step, batch in enumerate(training_batches(corpus, 3)):
        out = model(batch.tokens, segment_ids=batch.segment_ids)
        text = (batch.labels != -100) & ~batch.recall_mask
        lm_loss = F.cross_entropy(out.logits[text], batch.labels[text])
        recall_loss = F.cross_entropy(out.logits[batch.recall_mask], batch.labels[batch.recall_mask])
        weight = 0.5 - 0.4 * step / 3
        total = lm_loss + 0.7 * recall_loss + weight * polarization_loss(out.gates)
        adamw.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rate = adamw.param_groups[0]["lr"]
        adamw.step()
        cosine.step()
        row = rows[step]
        bytes_read = int(batch.num_bytes.sum())
        expected = {
            "step": step + 1,
            "loss": lm_loss + 0.7 * recall_loss,
            "lm_loss": lm_loss,
            "recall_loss": recall_loss,
            "total_loss": total,
            "perplexity": lm_loss.exp(),
            "bits_per_byte": lm_loss * text.sum() / math.log(2) / bytes_read,
            "polar_loss": polarization_loss(out.gates),
            "polar_weight": weight,
            "gate_mean": out.gates.mean(),
            "grad_norm": norm,
            "learning_rate": rate,
            "chunk_size": 8,
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-4), name
    assert int(fitted.polarization.step) == 3
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            dict(fitted.model.named_parameters())[name], parameter, atol=1e-6, rtol=1e-4
        )


def test_accumulated_batches_are_one_step(corpus):
    fitted, rows = module(), []
    fitted.step_metrics.subscribe(rows.extend)
    trainer(max_steps=2, accumulate_grad_batches=2).fit(fitted, datamodule=data(corpus))
    assert [row["step"] for row in rows] == [1, 2]
    model = module().model
    losses = []
    for batch in training_batches(corpus, 2):
        out = model(batch.tokens, segment_ids=batch.segment_ids)
        text = (batch.labels != -100) & ~batch.recall_mask
        losses.append(F.cross_entropy(out.logits[text], batch.labels[text]).item())
    assert rows[0]["lm_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_without_memory_there_are_no_gates(corpus):
    fitted, rows = module(memory_heads=0), []
    fitted.step_metrics.subscribe(rows.extend)
    trainer().fit(fitted, datamodule=data(corpus))
    assert not [name for name in rows[0] if "gate" in name or "polar" in name]
    assert rows[0]["total_loss"] == rows[0]["loss"]


def evaluated(fitted: MemoryLM, stage: str, corpus: Path) -> dict[str, float]:
    runner = trainer(limit_val_batches=None)
    call = runner.validate if stage == "val" else runner.test
    return dict(call(fitted, datamodule=data(corpus), verbose=False)[0])


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_is_over_whole_passes(corpus, stage):
    fitted = module()
    logged = evaluated(fitted, stage, corpus)
    source = data(corpus)
    source.setup("fit")
    names, loaders = (
        (source.val_names, source.val_dataloader())
        if stage == "val"
        else (source.test_names, source.test_dataloader())
    )
    all_nats = all_bytes = 0.0
    for name, loader in zip(names, loaders, strict=True):
        nats = num_bytes = right = right_off = asked = 0.0
        for batch in loader:
            with torch.no_grad():
                logits = fitted.model(batch.tokens, segment_ids=batch.segment_ids).logits
                fitted.model.memory_enabled = False
                off = fitted.model(batch.tokens, segment_ids=batch.segment_ids).logits
                fitted.model.memory_enabled = True
            text = (batch.labels != -100) & ~batch.recall_mask
            nats += float(F.cross_entropy(logits[text], batch.labels[text], reduction="sum"))
            num_bytes += int(batch.num_bytes.sum())
            mask = batch.recall_mask
            asked += int(mask.sum())
            right += int((logits.argmax(-1) == batch.labels)[mask].sum())
            right_off += int((off.argmax(-1) == batch.labels)[mask].sum())
        if name.startswith("recall"):
            assert logged[f"{stage}/{name}_accuracy"] == pytest.approx(right / asked)
            assert logged[f"{stage}/{name}_accuracy_memory_off"] == pytest.approx(right_off / asked)
        else:
            all_nats, all_bytes = all_nats + nats, all_bytes + num_bytes
            found = logged[f"{stage}/{name}_bits_per_byte"]
            assert found == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert logged[f"{stage}/bits_per_byte"] == pytest.approx(all_nats / math.log(2) / all_bytes, rel=1e-5)


def test_a_second_validation_forgets_the_first(corpus):
    fitted = module()
    assert evaluated(fitted, "val", corpus) == evaluated(fitted, "val", corpus)


def test_distances_beyond_attentions_reach_are_told_apart(corpus):
    assert module(blocks=3, window=5).reach == 12
    logged = evaluated(module(), "val", corpus)
    assert {"val/recall_accuracy_inside", "val/recall_accuracy_beyond"} <= set(logged)


class Board(Callback):
    """The generator's state before and after validations."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.states.append(torch.get_rng_state())

    on_validation_end = on_validation_start


def test_validation_writes_text_and_leaves_the_generators_alone(corpus, tmp_path):
    logger, board = RunTensorBoardLogger(str(tmp_path)), Board()
    runner = trainer(
        logger=logger, callbacks=[board], limit_val_batches=None, val_check_interval=2, max_steps=4
    )
    runner.fit(module(sample_tokens=5, sample_temperature=0.0), datamodule=data(corpus))
    assert len(board.states) >= 4
    for before, after in zip(board.states[::2], board.states[1::2], strict=True):
        assert torch.equal(before, after)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    for name in ("prose", "code"):
        shown = events.Tensors(f"val/sample_{name}/text_summary")
        assert [event.step for event in shown] == [1, 3]
        assert b"[...]" in shown[0].tensor_proto.string_val[0]


def test_speed_is_logged_with_its_share_of_the_peak(corpus, tmp_path):
    fitted = module(peak_tflops=1e-3)
    logger = RunTensorBoardLogger(str(tmp_path))
    trainer(logger=logger, max_steps=4, log_every_n_steps=2).fit(fitted, datamodule=data(corpus))
    events = EventAccumulator(str(tmp_path)).Reload()
    rates = {tag: events.Scalars(f"perf/{tag}") for tag in ("tokens_per_second", "step_seconds", "mfu")}
    assert [event.step for event in rates["mfu"]] == [1, 3]
    tokens, seconds, mfu = (values[1].value for values in rates.values())
    assert tokens * seconds == pytest.approx(4 * 32, rel=1e-4)
    assert mfu == pytest.approx(tokens * training_flops_per_token(fitted.model, 32) / 1e9, rel=1e-4)
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/bits_per_byte",
        "gate/mean",
        "gate/polarized_ratio",
        "train/grad_norm",
    } <= tags


class NoNames(LightningDataModule):
    """Loaders without names."""

    def val_dataloader(self) -> list[Any]:
        return []


def test_loaders_without_names_are_refused():
    fitted = module()
    runner = trainer(limit_val_batches=None)
    runner.datamodule = NoNames()
    fitted.trainer = runner
    with pytest.raises(MisconfigurationException, match="names its loaders in val_names"):
        fitted.on_validation_start()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recall_weight": -1.0}, "recall_weight"),
        ({"sample_tokens": -1}, "sample_tokens"),
        ({"sample_temperature": -0.5}, "sample_temperature"),
        ({"rule": "magic"}, "rule must be one of"),
        ({"window": 1}, "window"),
        ({"polarization": Polarization(steps=0)}, "steps"),
    ],
)
def test_impossible_settings_are_refused_before_any_training(change, message):
    with pytest.raises(ValueError, match=message):
        module(**change)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_in_bfloat16_also_for_fused_optimisers(corpus, fused):
    fitted = module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0, fused=fused))
    before = torch.cat([p.detach().flatten() for p in fitted.model.parameters()])
    trainer(gradient_clip_val=0.01, precision="bf16-mixed", max_steps=1).fit(fitted, datamodule=data(corpus))
    after = torch.cat([p.detach().flatten() for p in fitted.model.parameters()])
    assert (after - before).norm() == pytest.approx(0.01, rel=1e-3)


def test_a_vocabulary_that_does_not_match_the_data_is_refused(corpus):
    with pytest.raises(ValueError, match="vocab_size is 300"):
        trainer().fit(module(vocab_size=300), datamodule=data(corpus))


def test_the_hyper_parameters_are_plain(corpus):
    fitted = module(polarization=Polarization(steps=7))
    assert fitted.hparams["polarization"]["steps"] == 7
    assert not {"optimizer", "lr_scheduler"} & set(fitted.hparams)


class ForbidSynchronisation(Callback):
    """Any wait for the device between two batches is an error, once kernels are compiled."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 4:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nothing_waits_for_the_device_between_logged_steps(corpus, precision):
    try:
        trainer(
            accelerator="cuda",
            devices=1,
            precision=precision,
            max_steps=30,
            log_every_n_steps=1000,
            gradient_clip_val=1.0,
            callbacks=[ForbidSynchronisation()],
        ).fit(module(width=32, memory_dim=16), datamodule=data(corpus, train_sequences_per_epoch=400))
    finally:
        torch.cuda.set_sync_debug_mode("default")
