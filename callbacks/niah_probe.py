"""Whether the memory remembers, while training runs: needles written into it, and asked for in prompts."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.charts import Bands, Chart, Lines, with_interval
from callbacks.evaluation_mode import evaluation_mode
from callbacks.intervals import checked_interval
from callbacks.loop_state import log_values, logging_step
from callbacks.metrics_jsonl import MetricsJSONL
from callbacks.niah_figures import draw_capacity, draw_heat_map
from callbacks.niah_result import NIAHResult
from callbacks.sharded_parameters import whole_parameters
from theria.memory.needle import CAPACITY_PAIRS, Haystack, draw_haystack, memory_branches, probe_memories
from theria.models.memory_lm import MemoryLM
from theria.models.needle_prompts import (
    PROMPT_CONTROLS,
    Prompts,
    attention_reach,
    make_prompts,
    needle_spec,
    probe_prompts,
)
from theria.tasks.recall import RecallSpec


class NIAHProbe(Callback):
    r"""Probes a memory language model for a needle in a haystack every n steps, at two levels.

    - Memory level: a random key and value are written among random pairs at a random depth through every
      block's own memory (``theria.memory.needle``); the cosine of what the key reads back with the value
      written, beside a key never stored and the rule's theory, over several numbers of pairs.
    - Behavioural level: the model answers prompts of associative recall whose needle lies farther back than
      attention reaches (``theria.models.needle_prompts``); accuracy by depth and length, beside three
      controls that should be at chance: memory switched off, key never stored, needle in the shard before.

    Loggers get ``niah/accuracy``, ``niah/cosine`` and what stands beside them, TensorBoard the figures
    ``niah/heat_map`` and ``niah/capacity``, and the step's record of ``MetricsJSONL``, which stands after
    this callback, niah_accuracy and niah_cosine (the mean over blocks and heads). A level below the
    threshold, the memory level judged by its worst head, or a control off chance is warned of; training goes
    on.

    Vectors and prompts are the same at every probe and in every run of this seed, from generators of their
    own; the module is put into evaluation mode and back, nothing of it changes, and training goes on bit for
    bit as without the callback. Only rank zero measures. The last result is in ``last``.

    Args:
        every_n_steps: optimiser steps between two probes; the first one is after n steps.
        threshold: of the cosine and of the accuracy.
        pairs: written beside the needle at the memory level, where it is judged.
        capacity: numbers of pairs of the capacity curve.
        repetitions: needles at the memory level, in every head.
        lengths: tokens of the prompts; null takes two, the data's sequence length and the middle between it
            and the shortest that holds the pairs beyond attention's reach.
        prompts: of each length; 0 leaves the behavioural level out.
        controls: prompts of each length and each control.
        prompt_pairs: pairs in a prompt.
        queries: keys asked for in a prompt.
        depths: parts that the places of needles are divided into.
        seed: of vectors and prompts, in [0, 2^63).

    Raises:
        TypeError, ValueError: a value is impossible; the message names it.
        MisconfigurationException: when a fit is set up, if the module has no memory, the data module no
            recall, its sequences are too short, or ``MetricsJSONL`` stands before this callback.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        threshold: float = 0.8,
        pairs: int = 100,
        capacity: Sequence[int] = CAPACITY_PAIRS,
        repetitions: int = 16,
        lengths: Sequence[int] | None = None,
        prompts: int = 8,
        controls: int = 2,
        prompt_pairs: int = 16,
        queries: int = 8,
        depths: int = 4,
        seed: int = 0,
    ) -> None:
        self.every_n_steps = checked_interval(every_n_steps)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        if any(count < 1 for count in (pairs, *capacity)):
            raise ValueError(f"pairs and capacity must be at least 1, got {pairs} and {list(capacity)}")
        for name, value, least in (
            ("repetitions", repetitions, 2),
            ("prompts", prompts, 0),
            ("prompt_pairs", prompt_pairs, 1),
            ("queries", queries, 1),
            ("depths", depths, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if prompts and not 1 <= controls <= prompts:
            raise ValueError(f"controls must be from 1 to prompts = {prompts}, got {controls}")
        if lengths is not None and len(set(lengths)) < max(len(lengths), 1):
            raise ValueError(f"lengths must be one or more different numbers, or null, got {list(lengths)}")
        self.threshold = threshold
        self.pairs = pairs
        self.capacity = tuple(sorted({pairs, *capacity}))
        self.repetitions = repetitions
        self.lengths = lengths
        self.prompts = prompts
        self.controls = controls
        self.prompt_pairs = prompt_pairs
        self.queries = queries
        self.depths = depths
        self.seed = seed
        self.last: NIAHResult | None = None
        self._asked: list[Prompts] = []
        self._fields: dict[int, dict[str, float]] = {}
        self._keeps_fields = False
        self._last_step = 0
        self._haystack: Haystack
        self._model: MemoryLM

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a memory to probe, and draw vectors and prompts."""
        if stage != "fit":
            return
        self._model = _model_of(pl_module)
        branch = memory_branches(self._model)[0]
        self._haystack = draw_haystack(
            self.repetitions, branch.heads, self.capacity[-1], branch.projection.dim, seed=self.seed
        )
        self._asked = self._make_prompts(trainer) if self.prompts else []
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its body
        recorders = [callback for callback in callbacks if isinstance(callback, MetricsJSONL)]
        if any(callbacks.index(recorder) < callbacks.index(self) for recorder in recorders):
            raise MisconfigurationException(
                f"{type(self).__name__} has to stand before MetricsJSONL in trainer.callbacks, or its "
                "numbers would come too late for the records"
            )
        self._keeps_fields = bool(recorders) and trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count on from the restored step."""
        self._last_step = trainer.global_step
        self._fields.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe when the number of finished optimiser steps passes a multiple of n."""
        last_step, self._last_step = self._last_step, trainer.global_step
        # a rollback makes the step smaller, which passes nothing
        due = self._last_step // self.every_n_steps > last_step // self.every_n_steps
        if due:
            with whole_parameters(pl_module):
                self._probe_and_log(trainer)

    def charts(self, trainer: Trainer) -> list[Chart]:
        """Both levels beside their controls, and accuracy by depth, 1 for the beginning of the prompt."""
        category = "Needle in a haystack"
        charts: list[Chart] = []
        if self.prompts:
            controls = tuple(f"niah/accuracy_{name}" for name in PROMPT_CONTROLS)
            charts = [
                Lines(category, "Accuracy by depth", (r"niah/accuracy_depth_\d+",)),
                Bands(category, "Accuracy (95%)", (with_interval("niah/accuracy"),)),
                Lines(
                    category,
                    "Memory on, off, and other controls",
                    ("niah/accuracy", *controls, "niah/chance"),
                ),
            ]
        charts += [
            Bands(category, "Cosine read back (95%)", (with_interval("niah/cosine"),)),
            Lines(category, "Cosine read back by pairs written", (r"niah/cosine_at_\d+",)),
        ]
        return [dataclasses.replace(chart, first_step=self.every_n_steps) for chart in charts]

    def step_fields(self, step: int) -> dict[str, float]:
        """The figures of a step that was probed, for its record."""
        return self._fields.pop(step, {})

    def probe(self, step: int) -> NIAHResult:
        """Measure both levels of the module that was set up, as it is now."""
        if (device := self._model.embedding.weight.device).type == "cuda":
            # what training has queued is not the probe's cost
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        with evaluation_mode(self._model):
            branches = memory_branches(self._model)
            haystack = self._haystack.like(branches[0])
            capacity = tuple(probe_memories(branches, haystack, pairs=pairs) for pairs in self.capacity)
            prompts = probe_prompts(self._model, self._asked) if self._asked else None
        memory = capacity[self.capacity.index(self.pairs)]
        return NIAHResult(step, memory, capacity, prompts, time.perf_counter() - started)

    def _probe_and_log(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        # in the precision of the training steps
        with trainer.precision_plugin.forward_context():
            found = self.probe(self._last_step)
        self.last = found
        if self._keeps_fields:
            self._fields[found.step] = found.fields()
        log_values(trainer, found.scalars(), logging_step(trainer))
        self._draw(trainer, found)
        for failure in found.failures(self.threshold):
            rank_zero_warn(f"{type(self).__name__}: at step {found.step} {failure}")

    def _make_prompts(self, trainer: Trainer) -> list[Prompts]:
        data: Any = getattr(trainer, "datamodule", None)
        source = data.recall_source("validation") if hasattr(data, "recall_source") else None
        if source is None:
            raise MisconfigurationException(
                f"{type(self).__name__} asks prompts of the data module's recall, as CalibrationText has it; "
                f"{type(data).__name__} has none: set prompts to 0 for the memory level alone"
            )
        reach = attention_reach(self._model)
        shortest = reach + 2 * self.queries + 2 * self.prompt_pairs
        longest = source.spec.length
        if self.lengths is None and shortest >= longest:
            raise MisconfigurationException(
                f"{type(self).__name__} needs sequences of more than {shortest} tokens for "
                f"{self.prompt_pairs} pairs beyond the {reach} that attention reaches back, and the data's "
                f"have {longest}: give lengths, or set prompts to 0 for the memory level alone"
            )
        lengths = self.lengths or ((shortest + longest) // 2, longest)
        try:
            return [self._prompts_of(source, length, reach) for length in lengths]
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} has no prompts: {error}") from error

    def _prompts_of(self, source: Any, length: int, reach: int) -> Prompts:
        """Those of one length, in the data's tokens and among its text."""

        def sample(spec: RecallSpec, ids: Tensor, control: Any) -> tuple[Tensor, Tensor, Tensor]:
            of_spec = dataclasses.replace(source, spec=spec, seed=self.seed)
            tokens, labels, segment_ids = of_spec.sample(0, ids, control=control)
            return tokens, labels, segment_ids

        spec = needle_spec(
            source.spec, length=length, reach=reach, pairs=self.prompt_pairs, queries=self.queries
        )
        return make_prompts(sample, spec, prompts=self.prompts, controls=self.controls, depths=self.depths)

    def _draw(self, trainer: Trainer, found: NIAHResult) -> None:
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        step = logging_step(trainer)
        for writer in writers:
            writer.add_figure("niah/capacity", draw_capacity(found.capacity, self.threshold), step)
            if found.prompts is not None:
                writer.add_figure("niah/heat_map", draw_heat_map(found.prompts), step)


def _model_of(module: LightningModule) -> MemoryLM:
    """The language model with a memory in ``model``."""
    model = getattr(module, "model", None)
    if not isinstance(model, MemoryLM) or not memory_branches(model):
        raise MisconfigurationException(
            "NIAHProbe needs a language model with a memory in `model`, as MemoryLM has it with memory_heads "
            f"of 1 or more; {type(module).__name__} has none: leave the callback out"
        )
    return model
