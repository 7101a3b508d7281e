"""What the command line refuses before anything runs."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from callbacks import LearningRateSearch, ResumableEarlyStopping, ResumableWeightAveraging
from lightning_modules.cli_errors import fail
from lightning_modules.fully_sharded import FullyShardedStrategy
from lightning_modules.run_directory import Restart

# Lightning's callbacks that have one here in their place, and why.
_REPLACED: tuple[tuple[type[Callback], type[Callback], str], ...] = (
    (EarlyStopping, ResumableEarlyStopping, "would let a checkpoint's patience override the configured one"),
    (
        WeightAveraging,
        ResumableWeightAveraging,
        "averages counters too, and loses the weights in training when a validation is interrupted",
    ),
    (
        StochasticWeightAveraging,
        ResumableWeightAveraging,
        "exchanges the learning-rate schedule for one by epochs and is not set back by a rollback",
    ),
    (
        LearningRateFinder,
        LearningRateSearch,
        "would set a rate that the schedule moves back at its next step",
    ),
)


def check_settings(model: LightningModule, trainer: Trainer) -> None:
    """Refuse what Lightning would stumble over only while it runs, or not at all."""
    if getattr(trainer, "val_check_interval", None) == 0:
        fail("trainer.val_check_interval must not be 0; for no validation set trainer.limit_val_batches to 0")
    strategy = trainer.strategy
    if isinstance(strategy, FullyShardedStrategy):
        try:
            strategy.check(model, trainer.callbacks)  # type: ignore[attr-defined]  # set outside of its body
        except MisconfigurationException as error:
            fail(str(error))
    elif isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        fail(
            f"trainer.strategy is Lightning's {type(strategy).__name__}, whose checkpoints no run here goes "
            "on from: take fully_sharded, as configs/trainer/fsdp.yaml does, or ddp"
        )
    if model.automatic_optimization:
        return
    for name, is_set in (
        ("gradient_clip_val", bool(trainer.gradient_clip_val)),
        ("accumulate_grad_batches", trainer.accumulate_grad_batches != 1),
    ):
        if is_set:
            instead = f"set model.init_args.{name} instead" if name in model.hparams else "leave it out"
            fail(
                f"trainer.{name} has no effect, since {type(model).__name__} takes its own optimiser steps: "
                f"{instead}"
            )


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks of Lightning that would do something wrong here without a word."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its class body
    for kind, own, why in _REPLACED:
        for callback in callbacks:
            if isinstance(callback, kind) and not isinstance(callback, own):
                fail(f"{type(callback).__name__} {why}: take {own.__name__}")


def check_agreement(model: LightningModule, data: LightningDataModule) -> None:
    """Refuse a model and data that were given different values of one setting."""
    for name in model.hparams.keys() & data.hparams.keys() - {"_class_path", "_instantiator"}:
        if model.hparams[name] != data.hparams[name]:
            fail(
                f"{name} is {model.hparams[name]} for {type(model).__name__} and {data.hparams[name]} for"
                f" {type(data).__name__}: give both the same"
            )


def check_shapes(model: LightningModule, restart: Restart) -> None:
    """Refuse a checkpoint of another model."""
    configured = model.state_dict()
    lacks = [name for name in configured if name not in restart.shapes]
    more = [name for name in restart.shapes if name not in configured]
    if lacks or more:
        what = [f"{verb} {names[0]}" for verb, names in (("lacks", lacks), ("has", more)) if names]
        fail(
            f"{restart.checkpoint} is of another model: beside {type(model).__name__} as configured it "
            f"{' and '.join(what)} ({len(lacks) + len(more)} such names); use the configuration of its run"
        )
    for name, value in configured.items():
        saved = restart.shapes[name]
        if saved != value.shape:
            fail(
                f"{restart.checkpoint} is of another model: {name} has the shape {tuple(saved)} in it and "
                f"{tuple(value.shape)} as configured; use the configuration of its run"
            )
