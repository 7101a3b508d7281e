"""Training of the memory language model: text, associative recall, and gates that decide."""

import dataclasses
import re
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from callbacks.charts import Chart, Lines, first_row, first_validation
from callbacks.loop_state import log_values, logging_step
from callbacks.sharded_parameters import whole_parameters, whole_tensor
from datamodules.packing import TextBatch
from lightning_modules.fully_sharded import FullyShardedStrategy, divide
from lightning_modules.host_memory import keep_freed_memory
from lightning_modules.optimisation import decay_groups
from lightning_modules.step_log import row_to_log
from lightning_modules.step_metrics import StepMetrics
from lightning_modules.text_evaluation import EvaluationSums, batch_sums, bits_per_byte, perplexity
from lightning_modules.throughput import Throughput, peak_flops_of
from lightning_modules.training_forward import CudaGraph, TrainingForward
from theria.memory import PolarizationSchedule, gate_statistics, polarization_loss
from theria.models.flops import training_flops_per_token
from theria.models.memory_lm import MemoryLM as Decoder

PROGRESS_BAR = ("loss", "bits_per_byte", "recall_accuracy")
PROMPT_TOKENS = 64
RECALL = "recall"


@dataclasses.dataclass(frozen=True)
class Polarization:
    """Weight of the polarisation loss over a run, see ``theria.memory.PolarizationSchedule``.

    Attributes:
        steps: length of the schedule.
        initial, final: weights at its begin and end; both 0 do without the loss.
        hold: share of the steps that keep the initial weight.
        shape: of the way from one to the other, "linear", "cosine" or "exponential".
    """

    steps: int = 1000
    initial: float = 10.0
    final: float = 0.1
    hold: float = 0.1
    shape: str = "exponential"


def adamw(params: Any) -> Optimizer:
    """AdamW at 3e-3, betas 0.9 and 0.95, weight decay 0.1 of what decays."""
    return torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


class MemoryLM(LightningModule):
    r"""A language model of sliding-window attention beside a memory, on text with associative recall in it.

    .. math::
        L = L_{text} + w L_{recall} + \lambda(t) \, \mathrm{mean}(1 - |2 g - 1|)

    with the mean cross-entropy of text labels, that of recall's answers, and the polarisation of the gates.
    Weights of linear maps decay, nothing else does (``decay_groups``).

    Args:
        vocab_size: tokens; those of the data, or their next multiple of 128.
        width: of the residual stream.
        blocks: of attention beside a memory, and an MLP.
        heads: attention heads; width / heads is even.
        window: tokens that attention sees, its own included.
        memory_heads: of each block's memory; 0 for attention alone.
        memory_dim: width of a memory head.
        rule: how pairs are written, hebbian, delta or gated_delta.
        slots: persistent vectors a memory head.
        taps: tokens that the memory's short convolution sees.
        mlp_hidden: hidden width of the MLPs; null for 8/3 of the width.
        dropout: share of what blocks add to the residual stream that training drops.
        chunk_size: tokens that the memory computes together.
        kernel: of the memory, auto, tensor or fla.
        backend: of attention, see ``theria.attention``.
        recall_weight: w above.
        polarization: lambda over the steps; null does without.
        compile: compile the decoder's training forward with torch.compile.
        cuda_graph: capture the decoder's training forward and backward in CUDA graphs. ``auto`` does on CUDA
            devices, unless FSDP divides the parameters; ``on`` demands it, ``off`` does not.
        peak_tflops: what the device could do, for perf/mfu; null looks the device up for half precision, and
            leaves perf/mfu out where it is not known.
        sample_tokens: tokens written after a prompt of each domain at every validation; 0 for none.
        sample_temperature: of these samples; 0 takes the likeliest token.
        optimizer: called with two parameter groups, decaying and not.
        lr_scheduler: called with the optimiser and stepped once a step; null keeps the rate.
    """

    def __init__(
        self,
        vocab_size: int = 449,
        width: int = 128,
        blocks: int = 2,
        heads: int = 4,
        window: int = 32,
        memory_heads: int = 1,
        memory_dim: int = 128,
        rule: str = "delta",
        slots: int = 64,
        taps: int = 4,
        mlp_hidden: int | None = None,
        dropout: float = 0.0,
        chunk_size: int = 64,
        kernel: str = "auto",
        backend: str = "auto",
        recall_weight: float = 1.0,
        polarization: Polarization | None = None,
        compile: bool = False,
        cuda_graph: CudaGraph = "auto",
        peak_tflops: float | None = None,
        sample_tokens: int = 128,
        sample_temperature: float = 0.8,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "polarization"])
        schedule = (
            Polarization(initial=0.0, final=0.0, shape="linear") if polarization is None else polarization
        )
        # a dataclass in hyper-parameters would break checkpoints that load with weights_only
        self.save_hyperparameters({"polarization": dataclasses.asdict(schedule)})
        for name, value in (
            ("recall_weight", recall_weight),
            ("sample_tokens", sample_tokens),
            ("sample_temperature", sample_temperature),
        ):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if cuda_graph not in ("auto", "on", "off"):
            raise ValueError(f"cuda_graph must be auto, on or off, got {cuda_graph!r}")
        self.vocab_size = vocab_size
        self.model = Decoder(
            vocab_size,
            width=width,
            blocks=blocks,
            heads=heads,
            window=window,
            memory_heads=memory_heads,
            memory_dim=memory_dim,
            rule=rule,
            slots=slots,
            taps=taps,
            mlp_hidden=mlp_hidden,
            dropout=dropout,
            chunk_size=chunk_size,
            kernel=kernel,
            backend=backend,
        )
        self.reach = blocks * (window - 1)
        self.polarization = PolarizationSchedule(**dataclasses.asdict(schedule))
        self.recall_weight = recall_weight
        self.peak_tflops = peak_tflops
        self.sample_tokens = sample_tokens
        self.sample_temperature = sample_temperature
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.step_metrics = StepMetrics()
        self.compile_forward, self.cuda_graph = compile, cuda_graph
        self._training_forward: TrainingForward | None = None
        self._throughput = Throughput()
        self._parts: list[dict[str, Tensor]] = []
        self._gradient_norm: Tensor | None = None
        self._learning_rate = 0.0
        self._finished_steps = 0
        self._sums: dict[str, EvaluationSums] = {}
        self._evaluation = ExitStack()

    def configure_optimizers(self) -> Any:
        """The optimiser over the decay groups, and its scheduler where one is configured."""
        optimizer = self.make_optimizer(decay_groups(self.model))
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise MisconfigurationException(
                "ReduceLROnPlateau waits for a metric, but the scheduler steps once a step without one"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_model(self) -> None:
        """Under `FullyShardedStrategy`, divide the model over the processes, block by block."""
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            divide(self.model, list(self.model.blocks), self.trainer.strategy.data_mesh)

    def on_fit_start(self) -> None:
        """Prepare what depends on the device and the number of ranks."""
        if self.device.type == "cpu":
            keep_freed_memory()
        self._training_forward = TrainingForward(
            self.model,
            compiled=self.compile_forward,
            cuda_graph=self.cuda_graph,
            strategy=self.trainer.strategy,
        )
        self.step_metrics.reduce = self._mean_over_ranks if self.trainer.world_size > 1 else None
        precision = str(self.trainer.precision)
        if peak_flops_of(self.device, precision, self.peak_tflops) is None:
            rank_zero_info(
                f"perf/mfu is left out: no peak of this {self.device.type} in {precision} is known; "
                "model.init_args.peak_tflops gives one"
            )

    def on_fit_end(self) -> None:
        """Give back what compiled and captured functions hold."""
        self._training_forward = None

    def on_train_start(self) -> None:
        """Start the clocks and count on from the restored step."""
        self._finished_steps = self.trainer.global_step
        self._parts.clear()
        self._throughput.start()

    def on_train_batch_start(self, batch: TextBatch, batch_idx: int) -> None:
        """Where training was set back, forget what it had done since."""
        if self.trainer.global_step < self._finished_steps:
            self._finished_steps = self.trainer.global_step
            self._parts.clear()

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        """The losses of one batch; its other figures wait on the device for the end of the step."""
        assert self._training_forward is not None
        logits, all_gates = self._training_forward(batch.tokens, batch.segment_ids)
        sums = batch_sums(logits, batch)
        if self.trainer.world_size > 1:
            sums = sums.over_ranks()
        loss = sums.lm_loss + self.recall_weight * sums.mean_recall_loss
        values = {
            "loss": loss,
            "lm_loss": sums.lm_loss,
            "recall_loss": sums.mean_recall_loss,
            "perplexity": perplexity(sums.lm_loss),
            "bits_per_byte": bits_per_byte(sums.text_loss, sums.num_bytes),
            "recall_accuracy": sums.recall_correct / sums.recall_labels.clamp_min(1),
        }
        total = loss
        if all_gates is not None:
            polar_loss = polarization_loss(all_gates)
            weight = self.polarization.weight()
            total = loss + weight * polar_loss
            gates = gate_statistics(all_gates)
            values |= {
                "polar_loss": polar_loss,
                "polar_weight": weight,
                "gate_mean": gates.mean,
                "gate_std": gates.std,
                "gate_token_std": gates.token_std,
                "gate_low": gates.low,
                "gate_high": gates.high,
                "polarized_ratio": gates.polarized_ratio,
            }
        values["total_loss"] = total
        self._parts.append({name: value.detach() for name, value in values.items()})
        self._throughput.count(batch.tokens)
        return {"loss": total, "lm_loss": values["lm_loss"].detach()}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note the gradient's norm before it is clipped, and the rate before the scheduler moves it."""
        self._learning_rate = float(optimizer.param_groups[0]["lr"])
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self._gradient_norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning clips, but fused optimisers in bfloat16 as well.

        Lightning refuses those in any mixed precision, for the sake of gradient scalers; bfloat16 has none.
        """
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if gradient_clip_val and fused and scaler is None:
            clip = gradient_clip_algorithm or "norm"
            Precision.clip_gradients(
                self.trainer.precision_plugin, optimizer, gradient_clip_val, GradClipAlgorithmType(clip)
            )
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: TextBatch, batch_idx: int) -> None:
        """Where an optimiser step ended: count it, keep its row, and log where the trainer logs."""
        if self.trainer.global_step == self._finished_steps or self._gradient_norm is None:
            return
        self._finished_steps = self.trainer.global_step
        parts, self._parts = self._parts, []
        row: dict[str, Tensor | float] = {
            name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]
        }
        row["grad_norm"] = self._gradient_norm
        row["learning_rate"] = self._learning_rate
        row["step_seconds"] = self._throughput.step()
        row["chunk_size"] = self.hparams["chunk_size"]
        self.step_metrics.append(self._finished_steps, row)
        self.polarization.advance()
        self._show_step()

    def on_validation_start(self) -> None:
        """New sums for every loader; the clock of training stands still."""
        self._throughput.pause()
        self._start_evaluation("val_names")

    def on_validation_end(self) -> None:
        """Go on with the clock of training."""
        self._evaluation.close()
        self._throughput.resume()

    def on_test_start(self) -> None:
        """New sums for every loader."""
        self._start_evaluation("test_names")

    def on_test_end(self) -> None:
        """Divide again what evaluation had whole."""
        self._evaluation.close()

    def validation_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its loader's sums, recall also with the memory off; write a sample of text."""
        name = list(self._sums)[dataloader_idx]
        self._evaluate(name, batch, memory_off=name.startswith(RECALL))
        if batch_idx == 0 and self.sample_tokens and not name.startswith(RECALL):
            self._write_sample(name, batch)

    def test_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its loader's sums, with the memory on and off."""
        self._evaluate(list(self._sums)[dataloader_idx], batch, memory_off=True)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all loaders."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """Log the figures of all loaders."""
        self._log_figures("test")

    def charts(self, trainer: Trainer) -> list[Chart]:
        """Text, recall with the memory on and off, and the gates."""
        row, first = first_row(trainer), first_validation(trainer)
        names = self._loader_names("val_names")
        text = tuple(re.escape(name) for name in names if not name.startswith(RECALL))
        domains = tuple(f"val/{name}_bits_per_byte" for name in text)
        recalls = tuple(re.escape(name) for name in names if name.startswith(RECALL))
        recall = tuple(f"val/{name}_accuracy{which}" for name in recalls for which in self._recall_figures())
        charts: list[Chart] = [
            Lines("Language model", "Loss, all and text alone", ("train/loss", "train/lm_loss"), row),
            Lines("Language model", "Perplexity", ("train/perplexity", "val/perplexity"), max(row, first)),
            Lines("Language model", "Bits per byte of held-out text", ("val/bits_per_byte", *domains), first),
        ]
        if recall:
            title = "Recall with the memory on and off" if self._remembers else "Recall"
            charts.append(Lines("Recall", title, recall, first))
            charts.append(Lines("Recall", "Recall in training", ("train/recall_accuracy",), row))
        if self._remembers:
            spread = ("gate/std", "gate/token_std")
            decided = ("gate/low", "gate/high", "gate/polarized_ratio")
            charts += [
                Lines("Gates", "Mean gate, 0 for attention and 1 for memory", ("gate/mean",), row),
                Lines("Gates", "Spread, over all gates and over tokens", spread, row),
                Lines("Gates", "Shares of shut, open and decided gates", decided, row),
            ]
        return charts

    def _recall_figures(self) -> tuple[str, ...]:
        return ("", "_memory_off", "_beyond") if self._remembers else ("", "_beyond")

    def _show_step(self) -> None:
        """Log the step's values on the steps the trainer logs."""
        row = row_to_log(self, self.step_metrics, PROGRESS_BAR)
        if row is None:
            return
        hidden = {"step", "step_seconds", "chunk_size", *PROGRESS_BAR}
        values = {_tag(name): value for name, value in row.items() if name not in hidden}
        log_values(self.trainer, values | self._speed(), logging_step(self.trainer))

    def _speed(self) -> dict[str, float]:
        """Means since the last time, which ended with the device read as this one does."""
        rate = self._throughput.lap()
        found = {"perf/tokens_per_second": rate.tokens_per_second, "perf/step_seconds": rate.step_seconds}
        peak = peak_flops_of(self.device, str(self.trainer.precision), self.peak_tflops)
        if peak is not None:
            flops = training_flops_per_token(self.model, rate.length)
            found["perf/mfu"] = flops * rate.tokens_per_second / peak
        return found

    def _evaluate(self, name: str, batch: TextBatch, *, memory_off: bool) -> None:
        logits = self._logits(batch)
        off = self._logits(batch, memory_enabled=False) if memory_off and self._remembers else None
        self._sums[name].add(logits, batch, off=off)

    def _logits(self, batch: TextBatch, *, memory_enabled: bool = True) -> Tensor:
        self.model.memory_enabled = memory_enabled
        try:
            logits: Tensor = self.model(batch.tokens, segment_ids=batch.segment_ids).logits
        finally:
            self.model.memory_enabled = True
        return logits

    @property
    def _remembers(self) -> bool:
        return bool(self.hparams["memory_heads"])

    def _loader_names(self, attribute: str) -> tuple[str, ...]:
        names = getattr(getattr(self.trainer, "datamodule", None), attribute, None)
        if names is None:
            raise MisconfigurationException(
                f"MemoryLM needs a data module that names its loaders in {attribute}, as CalibrationText does"
            )
        return tuple(names)

    def _start_evaluation(self, loaders: str) -> None:
        names = self._loader_names(loaders)
        self._sums = {name: EvaluationSums(self.reach, self.device) for name in names}
        # ranks may have different numbers of batches, and samples are rank zero's
        self._evaluation.enter_context(whole_parameters(self.model))

    def _log_figures(self, stage: str) -> None:
        """Each loader's figures by its name, and those of all text together without one."""
        text = EvaluationSums(self.reach, self.device)
        for name, sums in self._sums.items():
            sums.sums = self.trainer.strategy.reduce(sums.sums, reduce_op="sum")
            if not name.startswith(RECALL):
                text.sums = text.sums + sums.sums
            self.log_dict({f"{stage}/{name}_{key}": value for key, value in sums.figures().items()})
        self.log_dict({f"{stage}/{key}": value for key, value in text.figures().items()})

    def _write_sample(self, name: str, batch: TextBatch) -> None:
        """Show how the model goes on from a validation text, without touching the random generators."""
        boards = [logger for logger in self.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or self.trainer.sanity_checking or not self.trainer.is_global_zero:
            return
        prompt = batch.tokens[:1, :PROMPT_TOKENS]
        generator = torch.Generator(self.device).manual_seed(0)
        written = self.model.generate(
            prompt, self.sample_tokens, temperature=self.sample_temperature, generator=generator
        )[0].tolist()
        decode = self.trainer.datamodule.decode  # type: ignore[attr-defined]  # of the loaders' data module
        begun, added = decode(written[: prompt.shape[1]]), decode(written[prompt.shape[1] :])
        text = "".join(f"    {line}\n" for line in f"{begun}\n[...]\n{added}".split("\n"))
        for board in boards:
            board.experiment.add_text(f"val/sample_{name}", text, max(self.trainer.global_step - 1, 0))

    def _mean_over_ranks(self, rows: Tensor) -> Tensor:
        gathered: Tensor = self.all_gather(rows)  # type: ignore[assignment]  # of a tensor it is one
        return gathered.mean(0)


def _tag(name: str) -> str:
    """The tag of a row's entry: gate/ for the gates', train/ for all else."""
    gate = name.removeprefix("gate_")
    return f"gate/{gate}" if gate != name or name == "polarized_ratio" else f"train/{name}"
