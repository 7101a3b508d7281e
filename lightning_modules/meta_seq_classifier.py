"""Meta-learning of a sequence classifier: the outer loop."""

import time
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from callbacks.charts import Bands, Chart, Lines, first_row, first_validation, with_interval
from callbacks.loop_state import log_values, logging_step
from lightning_modules.host_memory import keep_freed_memory
from lightning_modules.metrics import Interval, MeanOverTasks
from lightning_modules.step_log import row_to_log
from lightning_modules.step_metrics import StepMetrics
from theria.cuda_graph import CapturedFunction
from theria.maml import (
    MetaGradient,
    TaskModel,
    adaptation_curve,
    check_options,
    meta_gradient,
)
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import TaskBatch

PROGRESS_BAR = ("loss", "query_accuracy")
GRADIENT_GROUPS = ("q_proj", "k_proj", "v_proj", "head")


def adam(params: Any) -> torch.optim.Optimizer:
    """The study's outer optimiser: Adam, default betas, learning rate 1e-3."""
    return torch.optim.Adam(params, lr=1e-3)


class MetaSeqClassifier(LightningModule):
    """Second-order, first-order or strictly first-order MAML over an attention classifier.

    One batch is a meta-batch of tasks and one outer step. Optimisation is manual: the meta-gradient is
    computed by `theria.maml.meta_gradient` and reaches ``.grad`` through ``manual_backward`` of
    sum(theta * stopgrad(g)), so that gradient hooks (DDP among them) see it in every mode.

    Args:
        width: model width E; the data's width must be the same.
        num_classes: classes of every task.
        backend: attention backend, see ``theria.attention``.
        absorb_projections: fold the key and value projections into the single query (the same function,
            faster; the backend then sees the raw sequence as keys and values).
        mode: FULL, FO or FO_STRICT.
        inner_steps: gradient steps of the inner loop.
        inner_lr: their rate.
        strategy: ``unrolled`` or ``sweep``.
        inner_checkpoint: recompute the unrolled graph in segments of this many inner steps; 0 keeps it.
        adapt: names of modules or parameters the inner loop adapts; null adapts all.
        cuda_graph: capture the meta-gradient in a CUDA graph. ``auto`` does on a CUDA device without
            autocast; ``on`` insists and raises where it cannot; ``off`` never does.
        optimizer: outer optimiser, called with the parameters.
        lr_scheduler: called with the optimiser and stepped once an outer step; null keeps the rate.
        gradient_clip_val: norm that the meta-gradient is scaled down to; null leaves it. Here, since
            ``trainer.gradient_clip_val`` does nothing under manual optimisation. Norms that are logged are
            those before.

    Attributes:
        val_interval: of the newest validation over all its tasks, query accuracy, query loss and support loss
            after 0 to inner_steps steps, one behind the other; None before the first.
    """

    def __init__(
        self,
        width: int = 64,
        num_classes: int = 5,
        backend: str = "auto",
        absorb_projections: bool = False,
        mode: str = "FULL",
        inner_steps: int = 5,
        inner_lr: float = 0.4,
        strategy: str = "unrolled",
        inner_checkpoint: int = 0,
        adapt: list[str] | None = None,
        cuda_graph: Literal["auto", "on", "off"] = "auto",
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip_val: float | None = None,
    ) -> None:
        super().__init__()
        check_options(mode, strategy, inner_steps, inner_lr, inner_checkpoint)
        if cuda_graph not in ("auto", "on", "off"):
            raise ValueError(f"cuda_graph must be auto, on or off, got {cuda_graph!r}")
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(f"gradient_clip_val must be positive or null, got {gradient_clip_val}")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.automatic_optimization = False
        self.model = SeqClassifier(width, num_classes, backend=backend, absorb_projections=absorb_projections)
        TaskModel(self.model, adapt)  # refuses names that cover no parameter
        self._compute = partial(
            meta_gradient,
            self.model,
            mode=mode,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            strategy=strategy,
            inner_checkpoint=inner_checkpoint,
            adapt=adapt,
            diagnostics=True,
        )
        self._adaptation = partial(
            adaptation_curve, self.model, inner_steps=inner_steps, inner_lr=inner_lr, adapt=adapt
        )
        self.cuda_graph = cuda_graph
        self.gradient_clip_val = gradient_clip_val
        self._gradient_norms: dict[str, Tensor] = {}
        self._learning_rate: Tensor | float = 0.0
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.step_metrics = StepMetrics()
        self.val_curve = MeanOverTasks(3 * (inner_steps + 1))
        self.test_curve = MeanOverTasks(3 * (inner_steps + 1))
        self.val_interval: Interval | None = None
        self._captured: CapturedFunction[MetaGradient] | None = None
        self._step_started = time.perf_counter()

    def configure_optimizers(self) -> Any:
        """The outer optimiser, and its scheduler where one is configured."""
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise MisconfigurationException(
                "ReduceLROnPlateau waits for a metric, but the scheduler steps once an outer step without one"
            )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        """Forget the graph of an earlier fit, which reads parameters where they no longer stand."""
        self._captured = None
        if self.device.type == "cpu":
            keep_freed_memory()
        self.step_metrics.reduce = self._mean_over_ranks if self.trainer.world_size > 1 else None

    def on_train_start(self) -> None:
        """Start the clock of the first outer step."""
        self._step_started = time.perf_counter()

    def training_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """One outer step on one meta-batch."""
        result = self.meta_gradient(batch)
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        named = [(name, p) for name, p in self.model.named_parameters() if name in result.grads]
        surrogate = torch.dot(
            torch.cat([p.flatten() for _, p in named]),
            torch.cat([result.grads[name].flatten() for name, _ in named]),
        )
        self.manual_backward(surrogate)
        optimizer.step()
        if (scheduler := self.lr_schedulers()) is not None:
            cast(LRScheduler, scheduler).step()
        self.step_metrics.append(self.trainer.global_step, self._row(result))
        self._show_step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note the rate and the gradient's norms, then clip it; no gradient scaler's factor is in it."""
        rate = optimizer.param_groups[0]["lr"]
        self._learning_rate = rate.clone() if isinstance(rate, Tensor) else rate
        for group in GRADIENT_GROUPS:
            gradients = [p.grad for p in getattr(self.model, group).parameters() if p.grad is not None]
            self._gradient_norms[f"grad_norm_{group}"] = torch.nn.utils.get_total_norm(gradients)
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, gradient_clip_algorithm="norm")

    def meta_gradient(self, batch: TaskBatch) -> MetaGradient:
        """The configured meta-gradient of one meta-batch, replayed from a CUDA graph where there is one."""
        inputs = batch[:4]
        if not self._capturable(batch):
            return self._meta_gradient_of(*inputs)
        if self._captured is None or not self._captured.fits(inputs):
            self._captured = CapturedFunction(self._meta_gradient_of, inputs, list(self.model.parameters()))
        return self._captured(*inputs)

    def _meta_gradient_of(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> MetaGradient:
        return self._compute((support_x, support_y), (query_x, query_y))

    def on_validation_start(self) -> None:
        """Adaptation differentiates, which inference mode forbids."""
        if torch.is_inference_mode_enabled():
            raise MisconfigurationException(
                "MetaSeqClassifier adapts during validation and test, which needs gradients: set"
                " trainer.inference_mode to false"
            )

    on_test_start = on_validation_start

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt every task and add its curve."""
        self.val_curve.update(self._curve(batch))

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt every task and add its curve."""
        self.test_curve.update(self._curve(batch))

    def on_validation_epoch_end(self) -> None:
        """Log means and intervals over all validation tasks."""
        self.val_interval = self._log_curve("val", self.val_curve)

    def on_test_epoch_end(self) -> None:
        """Log means and intervals over all test tasks."""
        self._log_curve("test", self.test_curve)

    def charts(self, trainer: Trainer) -> list[Chart]:
        """Adaptation to validation tasks, and the outer loop's own figures."""
        category, first, row = "Adaptation", first_validation(trainer), first_row(trainer)
        before, after = with_interval("val/query_accuracy_before"), with_interval("val/query_accuracy")
        steps = (r"val/query_accuracy_step_\d+",)
        query_loss = ("val/query_loss_before", "val/query_loss")
        support_loss = ("val/support_loss_before", "val/support_loss_after")
        training = ("train/query_accuracy_before", "train/query_accuracy")
        return [
            Bands(category, "Query accuracy before and after (95% over tasks)", (before, after), first),
            Lines(category, "Query accuracy by inner step", steps, first),
            Lines(category, "Query loss before and after", query_loss, first),
            Lines(category, "Support loss before and after", support_loss, first),
            Lines("Outer loop", "Query loss of training tasks", ("train/loss",), row),
            Lines("Outer loop", "Query accuracy of training tasks, before and after", training, row),
        ]

    def _show_step(self) -> None:
        """Log the step's values on the steps the trainer logs."""
        row = row_to_log(self, self.step_metrics, PROGRESS_BAR)
        if row is None:
            return
        hidden = {"step", "step_seconds", *PROGRESS_BAR}
        values = {f"train/{name}": value for name, value in row.items() if name not in hidden}
        log_values(
            self.trainer, values | {"perf/step_seconds": row["step_seconds"]}, logging_step(self.trainer)
        )

    def _curve(self, batch: TaskBatch) -> Tensor:
        support, query = (batch.support_x, batch.support_y), (batch.query_x, batch.query_y)
        curve = self._adaptation(support, query)
        return torch.cat([curve.query_accuracy, curve.query_loss, curve.support_loss])

    def _log_curve(self, stage: str, metric: MeanOverTasks) -> Interval:
        interval = metric.compute()
        metric.reset()
        accuracy, query_loss, support_loss = interval.mean.chunk(3)
        half = interval.ci95.chunk(3)[0]
        values = {
            "query_accuracy": accuracy[-1],
            "query_accuracy_ci95": half[-1],
            "query_accuracy_low": accuracy[-1] - half[-1],
            "query_accuracy_high": accuracy[-1] + half[-1],
            "query_accuracy_before": accuracy[0],
            "query_accuracy_before_low": accuracy[0] - half[0],
            "query_accuracy_before_high": accuracy[0] + half[0],
            "query_loss": query_loss[-1],
            "query_loss_before": query_loss[0],
            "support_loss_before": support_loss[0],
            "support_loss_after": support_loss[-1],
        }
        steps = {f"query_accuracy_step_{k:02d}": value for k, value in enumerate(accuracy)}
        self.log_dict({f"{stage}/{name}": value for name, value in (values | steps).items()}, prog_bar=False)
        return interval

    def _capturable(self, batch: TaskBatch) -> bool:
        if self.cuda_graph == "off":
            return False
        obstacle = None
        if not batch.support_x.is_cuda:
            obstacle = f"the batch is on {batch.support_x.device}"
        elif torch.is_autocast_enabled("cuda"):
            obstacle = "autocast is on"
        if obstacle and self.cuda_graph == "on":
            raise MisconfigurationException(f"cuda_graph is on, but {obstacle}; use auto or off")
        return obstacle is None

    def _row(self, result: MetaGradient) -> dict[str, Tensor | float]:
        now = time.perf_counter()
        seconds, self._step_started = now - self._step_started, now
        row: dict[str, Tensor | float] = {
            "loss": result.loss,
            "support_loss_before": result.support_loss_before,
            "query_accuracy": result.query_accuracy,
        }
        for name in ("support_loss_after", "query_accuracy_before"):
            row[name] = getattr(result, name)
        return row | self._gradient_norms | {"step_seconds": seconds, "learning_rate": self._learning_rate}

    def _mean_over_ranks(self, rows: Tensor) -> Tensor:
        return cast(Tensor, self.all_gather(rows)).mean(0)
