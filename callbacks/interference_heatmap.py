"""Interference of two tasks while training runs: scores and heat maps of the model as it is."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from callbacks.evaluation_mode import evaluation_mode
from callbacks.interference_figures import draw_heat_map
from callbacks.intervals import checked_interval
from callbacks.loop_state import log_values, logging_step
from datamodules.loader import BatchIndex
from datamodules.packing import IGNORED, TextBatch
from theria.interference import VARIANTS, InterferenceResult, Ridge, compute, detect_layout
from theria.interference.fisher import FISHERS
from theria.interference.scores import check_variants
from theria.models.memory_lm import MemoryLM
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

LossFn = Callable[[Any, Any], Tensor]

_RECALL = "recall"


class Probe(NamedTuple):
    """Samples of two tasks and the loss that takes them."""

    loss_fn: LossFn
    samples_a: Sequence[Any]
    samples_b: Sequence[Any]


class InterferenceHeatmap(Callback):
    """Logs how samples of two tasks interfere in the heads of the model, every n steps or when the fit ends.

    For a memory language model the tasks are the validation texts of two domains of its data, and a sample
    is a window of one with the mean loss of its labels. For a meta-learned sequence classifier they are two
    tasks drawn as the data's are, and a sample is one sequence with its loss at the initial parameters. The
    equations stand in `theria.interference`. For every variant and block, over pairs, layers and heads:

    - ``interference/VARIANT_BLOCK``: the mean score;
    - ``interference/negative_share_BLOCK``: the share of signed scores below 0, where there are such;
    - ``interference/ridge_share_BLOCK``: the share of entries that the ridge, not the Fisher information,
      decides;
    - ``interference/probe_seconds``: what the measurement took, ``interference/probe_share``: the part of
      the time since training began that all of them took;

    and in TensorBoard a heat map a variant. The samples are the same at every measurement. The model is put
    into evaluation mode for it and back into the modes it was in; parameters, their gradients and random
    generators are not touched, so that training goes on bit for bit as without the callback. The step after a
    measurement counts its time in ``perf/step_seconds``. Nothing is kept in checkpoints. Only rank zero
    measures.

    Args:
        every_n_steps: optimiser steps between two measurements; null measures only when the fit ends.
        at_fit_end: measure when the fit ends, too.
        tasks: names of two domains of text; null takes the first two, or for a classifier its two tasks.
        samples: of each task, at most.
        max_tokens: of a sample of text, of which the first are taken.
        variants: among directional, signed and symmetric.
        fisher: a, pooled or pooled_n.
        ridge: of the Fisher information, relative to its mean.
        memory_mib: for gradients and scores, beside the model.
        seed: of a classifier's tasks.

    Raises:
        TypeError, ValueError: a setting is impossible.
        MisconfigurationException: at the start of a fit, if the module has no model whose heads are known or
            the data no two tasks.
    """

    needs_whole_parameters = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        at_fit_end: bool = True,
        tasks: list[str] | None = None,
        samples: int = 16,
        max_tokens: int = 128,
        variants: list[str] | None = None,
        fisher: str = "pooled_n",
        ridge: float = 1e-3,
        memory_mib: float = 256,
        seed: int = 0,
    ) -> None:
        if every_n_steps is not None:
            checked_interval(every_n_steps)
        elif not at_fit_end:
            raise ValueError("every_n_steps is null and at_fit_end false: leave the callback out for never")
        for name, value, least in (("samples", samples, 1), ("max_tokens", max_tokens, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if tasks is not None and (len(tasks) != 2 or tasks[0] == tasks[1]):
            raise ValueError(f"tasks must name two domains, got {tasks}")
        if fisher not in FISHERS:
            raise ValueError(f"fisher must be one of {', '.join(FISHERS)}, got {fisher!r}")
        if memory_mib <= 0:
            raise ValueError(f"memory_mib must be above 0, got {memory_mib}")
        self.every_n_steps, self.at_fit_end = every_n_steps, at_fit_end
        self.tasks, self.samples, self.max_tokens, self.seed = tasks, samples, max_tokens, seed
        self.variants = tuple(VARIANTS if variants is None else variants)
        check_variants(self.variants)
        self.fisher, self.ridge, self.memory_mib = fisher, Ridge("relative", ridge), memory_mib
        self._last_step, self._measured_step = 0, -1
        self._started = self._seconds = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to measure, before anything is trained."""
        model, of = getattr(pl_module, "model", None), type(pl_module).__name__
        if not isinstance(model, MemoryLM | SeqClassifier):
            raise MisconfigurationException(
                f"{type(self).__name__} knows the losses of MemoryLM and MetaSeqClassifier by their `model`;"
                f" {of} has none such: leave the callback out"
            )
        detect_layout(model)
        data = getattr(trainer, "datamodule", None)
        if isinstance(model, SeqClassifier):
            if not isinstance(getattr(data, "spec", None), SeqClsSpec) or self.tasks is not None:
                raise MisconfigurationException(
                    f"{type(self).__name__} draws two tasks like the data module's `spec`, as SyntheticSeqCls"
                    f" has it, and takes no names of tasks; got {type(data).__name__} and {self.tasks}"
                )
            return
        names = _domains(data)
        chosen = names[:2] if self.tasks is None else self.tasks
        if len(chosen) < 2 or not set(chosen) <= set(names):
            raise MisconfigurationException(
                f"{type(self).__name__} compares two domains of text, as CalibrationText has them;"
                f" {type(data).__name__} has {list(names)}, asked for is {self.tasks or 'the first two'}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock that the probe's share is of."""
        self._last_step, self._started, self._seconds = trainer.global_step, time.perf_counter(), 0.0
        self._measured_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when the number of finished optimiser steps passes a multiple of n."""
        last_step, self._last_step = self._last_step, trainer.global_step
        if self.every_n_steps is None:
            return
        if self._last_step // self.every_n_steps != last_step // self.every_n_steps:
            self._measure_and_log(trainer, pl_module, logging_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end, unless the last step was measured."""
        if self.at_fit_end and self._measured_step != trainer.global_step:
            self._measure_and_log(trainer, pl_module, max(trainer.global_step - 1, 0))

    def measure(self, trainer: Trainer, pl_module: Any) -> InterferenceResult:
        """Scores of the model as it is."""
        model = pl_module.model
        with evaluation_mode(model), warnings.catch_warnings():
            # few samples are what a probe is given
            warnings.filterwarnings("ignore", message=".*fewer than min_samples_for_fisher")
            probe = self.probe(trainer, pl_module)

            def loss_fn(model: nn.Module, sample: Any) -> Tensor:
                # in the precision of the training steps
                with trainer.precision_plugin.forward_context():
                    loss: Tensor = probe.loss_fn(model, sample)
                return loss

            return compute(
                model,
                loss_fn,
                probe.samples_a,
                probe.samples_b,
                variants=self.variants,
                fisher=self.fisher,
                ridge=self.ridge,
                computation_device="cuda" if pl_module.device.type == "cuda" else "cpu",
                memory_budget_mib=self.memory_mib,
            )

    def probe(self, trainer: Trainer, pl_module: Any) -> Probe:
        """The samples of both tasks, on the module's device."""
        data, device = trainer.datamodule, pl_module.device  # type: ignore[attr-defined]  # set outside of Trainer's class body
        if isinstance(pl_module.model, MemoryLM):
            names = _domains(data)
            chosen = names[:2] if self.tasks is None else self.tasks
            loaders = data.val_dataloader()
            texts = [self._windows(loaders[names.index(name)], device) for name in chosen]
            return Probe(_text_loss, *texts)
        batch = sample_tasks(
            data.spec,
            torch.arange(2, device=device),
            seed=self.seed,
            epoch=0,
            stream="validation",
            dtype=pl_module.model.head.weight.dtype,
        )
        x = torch.cat((batch.support_x, batch.query_x), dim=1)[:, : self.samples]
        y = torch.cat((batch.support_y, batch.query_y), dim=1)[:, : self.samples]
        a, b = (list(zip(x[task], y[task], strict=True)) for task in range(2))
        return Probe(_class_loss, a, b)

    def _windows(self, loader: Any, device: torch.device) -> list[TextBatch]:
        """Windows of one validation set, evenly spread where it is larger, each a batch of one."""
        size, found = loader.shard.num_items, []
        for place in np.unique(np.linspace(0, size - 1, min(self.samples, size)).astype(int)).tolist():
            window = loader.dataset[BatchIndex(0, range(place, place + 1))]
            parts = (part[:, : self.max_tokens] if part.ndim == 2 else part for part in window)
            found.append(TextBatch(*(part.to(device) for part in parts)))
        return [window for window in found if (window.labels != IGNORED).any()]

    def _measure_and_log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if not trainer.is_global_zero:
            return
        if pl_module.device.type == "cuda":
            # what training has queued is not the probe's cost
            torch.cuda.synchronize(pl_module.device)
        started = time.perf_counter()
        result = self.measure(trainer, pl_module)
        now = time.perf_counter()
        self._seconds += now - started
        self._measured_step = trainer.global_step
        values = _scalars(result) | {
            "interference/probe_seconds": now - started,
            "interference/probe_share": self._seconds / (now - self._started),
        }
        log_values(trainer, values, step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for variant in result.variants:
                    figure = draw_heat_map(result, variant)
                    logger.experiment.add_figure(f"interference/{variant}", figure, step)


def _domains(data: Any) -> tuple[str, ...]:
    """Names of the validation sets of text, which stand before those of recall."""
    return tuple(name for name in getattr(data, "val_names", ()) if not name.startswith(_RECALL))


def _scalars(result: InterferenceResult) -> dict[str, float]:
    found = {}
    for block in result.blocks:
        for variant in result.variants:
            found[f"interference/{variant}_{block}"] = _mean(result.layer_head_avg(variant, block))
        diagnostics = result.diagnostics[block]
        found[f"interference/ridge_share_{block}"] = _mean(diagnostics.ridge_share)
        if diagnostics.negative_share is not None:
            found[f"interference/negative_share_{block}"] = _mean(diagnostics.negative_share)
    return found


def _mean(values: np.ndarray) -> float:
    """Over what is there; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _text_loss(model: nn.Module, window: TextBatch) -> Tensor:
    logits = model(window.tokens, segment_ids=window.segment_ids).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, window.labels[0], ignore_index=IGNORED)


def _class_loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
    x, y = sample
    logits = model(x[None])
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y[None])
