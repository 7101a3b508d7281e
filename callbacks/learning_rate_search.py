"""A range test of learning rates, which suggests one and trains nothing."""

import csv
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner.lr_finder import _LRFinder
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import _TunerExitException
from matplotlib.figure import Figure


class LearningRateSearch(LearningRateFinder):
    """Trains some steps at rates that rise, suggests the rate at which the loss fell fastest, and ends.

    In the run directory it leaves `learning_rate_search.csv` (rate and smoothed loss of every step) and
    `learning_rate_search.png`. Lightning's finder would go on with the suggested rate, which a schedule moves
    back at its next step; here the suggestion is for the configuration, where it is the schedule's peak.

    Args:
        min_lr: the first rate.
        max_lr: the last rate.
        num_training_steps: steps between them, above 20 for a suggestion.
        early_stop_threshold: end early at a loss so many times the best.

    Raises:
        MisconfigurationException: the module takes its own optimiser steps, a checkpoint is given, or the
            losses allow no suggestion.
    """

    def __init__(
        self,
        min_lr: float = 1e-6,
        max_lr: float = 1.0,
        num_training_steps: int = 100,
        early_stop_threshold: float = 4.0,
    ) -> None:
        if not 0 < min_lr < max_lr:
            raise ValueError(f"expected 0 < min_lr < max_lr, got {min_lr} and {max_lr}")
        super().__init__(
            min_lr, max_lr, num_training_steps, early_stop_threshold=early_stop_threshold, update_attr=False
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, write what was found, and end."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside of Trainer's class body
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} cannot search for {type(pl_module).__name__}, which takes its own "
                "optimiser steps: compare short runs with --model.init_args.optimizer.init_args.lr"
            )
        if trainer.ckpt_path is not None:
            raise MisconfigurationException(
                f"{type(self).__name__} searches from new weights: leave ckpt_path out"
            )
        trainer.val_check_interval, trainer.check_val_every_n_epoch = self._num_training_steps + 1, None
        pl_module.on_fit_start()  # which else comes after the callbacks', and so never
        self.lr_find(trainer, pl_module)
        if self.optimal_lr is not None and trainer.is_global_zero:
            _report(self.optimal_lr, Path(trainer.log_dir or trainer.default_root_dir))
        raise _TunerExitException


def _report(search: _LRFinder, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "learning_rate_search.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["learning_rate", "loss"])
        writer.writerows(zip(search.results["lr"], search.results["loss"], strict=True))
    suggestion = search.suggestion()
    if suggestion is None:
        raise MisconfigurationException(
            f"{len(search.results['loss'])} steps allow no suggestion of a learning rate: take more than 20, "
            "and a lower max_lr where the loss diverges early"
        )
    figure = Figure(layout="constrained")
    search.plot(suggest=True, ax=figure.subplots())
    figure.savefig(directory / "learning_rate_search.png")
    rank_zero_info(
        f"suggested learning rate: --model.init_args.optimizer.init_args.lr {suggestion:.3g}, "
        f"from the losses in {directory}/learning_rate_search.csv and .png"
    )
