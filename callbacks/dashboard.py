"""TensorBoard as people want to find it: a page of charts, and runs to compare by what matters."""

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from callbacks.charts import Chart, HasCharts, layout_summary


class Dashboard(Callback):
    """Gives TensorBoard a custom-scalars layout and the run's hyper-parameters beside one metric.

    The layout is made of the ``charts`` that the module and the callbacks tell, in the order of the
    configuration, and leaves out those whose first values would come after ``trainer.max_steps``: every chart
    of it comes to life. A run that is resumed writes it again, and the newest counts.

    The hyper-parameters are those that the module and the data module have saved, and the optimiser, its
    learning rate, ``max_steps``, precision and the seed. TensorBoard shows with them the newest value of
    ``metric``; no value is made up for it, and there is no ``hp_metric``.

    It only writes when training starts, and only on rank zero.

    Args:
        metric: the tag that runs are compared by.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write layout and hyper-parameters."""
        if not trainer.is_global_zero:
            return
        layout = layout_summary(charts_of(trainer, pl_module))
        parts = hparams(hyper_parameters(trainer, pl_module), {self.metric: 0.0})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment._get_file_writer()
                for summary in (layout, *parts):
                    writer.add_summary(summary, 0)


def charts_of(trainer: Trainer, pl_module: LightningModule) -> list[Chart]:
    """What the module and the callbacks tell, of what comes within the training."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its body
    last = sys.float_info.max if trainer.max_steps == -1 else trainer.max_steps
    told = [part.charts(trainer) for part in (pl_module, *callbacks) if isinstance(part, HasCharts)]
    return [chart for charts in told for chart in charts if chart.first_step <= last]


def hyper_parameters(trainer: Trainer, pl_module: LightningModule) -> dict[str, float | str]:
    """What runs differ by, flat."""
    data: Any = getattr(trainer, "datamodule", None)
    found = dict(_flat(pl_module.hparams))
    if data is not None:
        found |= dict(_flat(data.hparams))
    if trainer.optimizers:
        group = trainer.optimizers[0].param_groups[0]
        # a scheduler keeps what the rate was before it
        rate = float(group.get("initial_lr", group["lr"]))
        found |= {"optimizer": type(trainer.optimizers[0]).__name__, "learning_rate": rate}
    found |= {"max_steps": trainer.max_steps, "precision": str(trainer.precision)}
    if (seed := os.environ.get("PL_GLOBAL_SEED")) is not None:
        found["seed_everything"] = int(seed)
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif not name.startswith("_"):  # how Lightning makes the object again
            # torch would write a truth value as a number
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            yield prefix + name, value if is_number else str(value)
