"""The two small models of the study, trained here, and the samples of two tasks of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything

from callbacks import InterferenceHeatmap
from callbacks.interference_heatmap import LossFn
from datamodules import CalibrationText, SyntheticSeqCls
from lightning_modules import MemoryLM, MetaSeqClassifier
from theria.interference import SampleGradients, collect


@dataclass(frozen=True)
class Trained:
    """A model after its training, and the gradients of its samples, task A's first.

    Attributes:
        name, title: of the model.
        what: one sentence on the model, its training and its tasks.
        gradients: of task A's samples and then of task B's.
        task_a, task_b: where they stand.
    """

    name: str
    title: str
    what: str
    gradients: SampleGradients
    task_a: range
    task_b: range


def train_language_model(steps: int, samples: int, seed: int, data: CalibrationText | None = None) -> Trained:
    """A memory language model on the running Python's documentation and sources."""
    seed_everything(seed, verbose=False)
    module = MemoryLM(
        vocab_size=257,
        width=64,
        blocks=2,
        heads=4,
        memory_dim=32,
        backend="reference",
        sample_tokens=0,
    )
    data = data or CalibrationText(sequence_length=128, val_sequences=None, recall=None, seed=seed)
    loss_fn, a, b = _fit(module, data, steps, samples, seed)
    first, second = list(data.domains)[:2]
    what = (
        f"{sum(p.numel() for p in module.parameters()):,} parameters, 2 blocks of 4 heads, {steps} steps on "
        f"text; A is {first}, B is {second}, a sample a validation window of "
        f"{data.sequence_length} bytes"
    )
    return _trained("memory_lm", "Memory language model", what, module, loss_fn, a, b)


def train_classifier(steps: int, samples: int, seed: int, data: SyntheticSeqCls | None = None) -> Trained:
    """A meta-learned sequence classifier, at its initial parameters, on two tasks."""
    seed_everything(seed, verbose=False)
    data = data or SyntheticSeqCls(seed=seed)
    spec = data.spec
    module = MetaSeqClassifier(width=spec.width, num_classes=spec.num_classes, backend="reference")
    loss_fn, a, b = _fit(module, data, steps, samples, seed)
    what = (
        f"{sum(p.numel() for p in module.parameters()):,} parameters, one layer of one head without output "
        f"projection, {steps} outer steps of second-order MAML; A and B are two validation tasks, a sample "
        "is one sequence, gradients those at the parameters that adaptation starts from"
    )
    return _trained("seq_classifier", "Meta-learned sequence classifier", what, module, loss_fn, a, b)


def _fit(
    module: LightningModule, data: LightningDataModule, steps: int, samples: int, seed: int
) -> tuple[LossFn, Sequence[Any], Sequence[Any]]:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        inference_mode=False,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    module.eval()
    probe = InterferenceHeatmap(samples=samples, seed=seed).probe(trainer, module)
    return probe.loss_fn, probe.samples_a, probe.samples_b


def _trained(
    name: str,
    title: str,
    what: str,
    module: Any,
    loss_fn: LossFn,
    samples_a: Sequence[Any],
    samples_b: Sequence[Any],
) -> Trained:
    # of B only half, so that the plain and the n-weighted mean of both tasks differ
    samples_b = samples_b[: max(1, len(samples_b) // 2)]
    ids = [("A", k) for k in range(len(samples_a))] + [("B", k) for k in range(len(samples_b))]
    gradients = collect(module.model, loss_fn, [*samples_a, *samples_b], ids=ids)
    return Trained(name, title, what, gradients, range(len(samples_a)), range(len(samples_a), len(ids)))
