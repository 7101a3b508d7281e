"""What training modules log of a step, on the steps the trainer logs."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule

from callbacks.loop_state import logging_step
from lightning_modules.step_metrics import StepMetrics


def row_to_log(module: LightningModule, metrics: StepMetrics, bar: Sequence[str]) -> dict[str, float] | None:
    """The last step's row where it is time to log, else None.

    The entries of the progress ``bar`` go through ``self.log``, which takes a millisecond on a GPU's host:
    only what the bar and callbacks read goes there, the rest through ``log_values``.
    """
    every = module.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of Trainer's body
    if (logging_step(module.trainer) + 1) % (every or 1) != 0:
        return None
    metrics.flush()
    row = metrics.last
    for name in bar:
        module.log(f"train/{name}", row[name], prog_bar=True)
    return row
