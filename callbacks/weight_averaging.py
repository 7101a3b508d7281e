"""A running average of the weights, which resuming, rollbacks and interruptions leave exact."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from callbacks.intervals import checked_interval
from callbacks.value_checks import check_at_least

State = dict[str, Tensor]

WEIGHTS = "current_model_state"
AVERAGING = "averaging_state"


class ResumableWeightAveraging(Callback):
    r"""Validates, tests and ends with an average of the weights, and trains the weights themselves.

    After every n-th optimiser step behind ``start_step``, with weights w, the average a is updated, from
    a = w at the first time on:

    .. math::
        a \leftarrow d \, a + (1 - d) \, w, \qquad
        \text{or} \quad a \leftarrow a + \frac{w - a}{m + 1} \quad \text{after } m \text{ updates, without } d

    Until then the weights stand for their average. A checkpoint holds the average as its ``state_dict``,
    which is what evaluation and other programs load, and the weights in training as ``current_model_state``.

    Lightning's callback of this purpose averages buffers too, counters among them, or leaves them behind by
    a step; saves the average as the weights in training where a validation is interrupted or training has
    ended; knows nothing of rollbacks; and copies the whole module, with all that its attributes lead to. Here
    there are parameters only. Callbacks that look at the model between validations see the weights in
    training.

    Args:
        decay: d above; null for the equally weighted mean (stochastic weight averaging).
        start_step: optimiser steps before averaging begins.
        every_n_steps: optimiser steps between two updates.

    Raises:
        TypeError, ValueError: a value is impossible; the message names it.
    """

    needs_whole_parameters = True
    _aside: list[Tensor]
    _updates: int
    _step: int
    _exchanged: bool

    def __init__(self, decay: float | None = 0.999, start_step: int = 0, every_n_steps: int = 1) -> None:
        check_at_least(start_step=(start_step, 0))
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1) or null, got {decay}")
        self.decay = decay
        self.start_step = start_step
        self.every_n_steps = checked_interval(every_n_steps)
        self._average = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)
        self._fitting = False
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin without an average."""
        self._fitting = stage == "fit"
        self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the model to its device."""
        pairs = zip(self._aside, pl_module.parameters(), strict=bool(self._aside))
        self._aside = [aside.to(parameter) for aside, parameter in pairs]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take up the weights where an optimiser step has ended after which it is time."""
        behind = trainer.global_step - self.start_step
        if trainer.global_step == self._step or behind <= 0 or behind % self.every_n_steps:
            return
        weights = [parameter.detach() for parameter in pl_module.parameters()]
        if self._updates:
            self._average(self._aside, weights, self._updates)
        else:
            self._aside = [weight.clone() for weight in weights]
        self._updates += 1
        self._step = trainer.global_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._exchange(pl_module, averaged=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights in training."""
        self._exchange(pl_module, averaged=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        self._exchange(pl_module, averaged=True)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make the average the checkpoint's `state_dict`, with the model's buffers, and add the weights."""
        if not self._fitting:
            return
        in_model: State = checkpoint["state_dict"]
        other = in_model | self._named_aside(pl_module)
        weights, average = (other, in_model) if self._exchanged else (in_model, other)
        checkpoint["state_dict"], checkpoint[WEIGHTS] = average, weights
        checkpoint[AVERAGING] = {"updates": self._updates, "step": self._step}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up weights and average; an evaluation has the average already."""
        if not self._fitting:
            return
        self._forget()
        if WEIGHTS not in checkpoint:
            rank_zero_warn("the checkpoint has no average of weights: one begins with the next update")
            return
        self._updates, self._step = checkpoint[AVERAGING]["updates"], checkpoint[AVERAGING]["step"]
        if self._updates:
            average: State = checkpoint["state_dict"]
            named = pl_module.named_parameters()
            self._aside = [average[name].to(parameter, copy=True) for name, parameter in named]
        pl_module.load_state_dict(checkpoint[WEIGHTS])

    def _forget(self) -> None:
        self._aside = []
        self._updates = self._step = 0
        self._exchanged = False  # whether the model has the average, and the weights in training are aside

    def _named_aside(self, pl_module: LightningModule) -> State:
        by_parameter = dict(zip(pl_module.parameters(), self._aside, strict=bool(self._aside)))
        named = pl_module.named_parameters(remove_duplicate=False)
        return {name: by_parameter[parameter] for name, parameter in named if parameter in by_parameter}

    @torch.no_grad()
    def _exchange(self, pl_module: LightningModule, *, averaged: bool) -> None:
        if not self._aside or self._exchanged == averaged:
            return
        self._exchanged = averaged
        for aside, parameter in zip(self._aside, pl_module.parameters(), strict=True):
            kept = aside.clone()
            aside.copy_(parameter)
            parameter.copy_(kept)
