"""Where training stands, and the loop counters of a checkpoint in the one form from which it goes on exactly.

Lightning infers from a few counters where a checkpoint was taken, and from some places it infers wrongly:
a validation that was due is skipped or one that was done runs again, an epoch ends without its hooks, the
loggers' step moves by one. `normalise` rewrites the counters of a checkpoint that is about to be written;
training resumed from it does what the uninterrupted run did next.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop

Counters = dict[str, Any]


def call_between_batches(trainer: Trainer, action: Callable[[], None]) -> None:
    """Call `action` after every training batch, once it is validated and its metrics are with the loggers.

    None of Lightning's hooks comes there: the loggers get a batch's metrics after the last of its hooks.
    """
    loop = trainer.fit_loop.epoch_loop
    finish_batch = loop.on_advance_end

    def on_advance_end(data_fetcher: Any) -> None:
        finish_batch(data_fetcher)
        action()

    loop.__dict__["on_advance_end"] = on_advance_end


def call_nothing_between_batches(trainer: Trainer) -> None:
    """Undo every `call_between_batches`."""
    trainer.fit_loop.epoch_loop.__dict__.pop("on_advance_end", None)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the training batch that has just been processed."""
    loop = trainer.fit_loop
    if loop._data_fetcher is None or not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
        return False
    batches = loop.epoch_loop.val_loop.max_batches
    return not batches or sum(batches) > 0  # no entry: the validation loader is not set up yet


def inside_validation(trainer: Trainer) -> bool:
    """Whether a validation that training waits for has begun and not seen its last batch."""
    fitting = trainer.state.fn == "fit" and trainer.validating
    return fitting and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch


def is_last_batch_of_training(trainer: Trainer) -> bool:
    """Whether training is known to end after the batch just processed and its validation."""
    loop = trainer.fit_loop
    if trainer.should_stop and loop._can_stop_early:
        return True
    if loop.max_steps != -1 and trainer.global_step >= loop.max_steps:
        return True
    last_epoch = loop.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (loop.max_epochs or 0)
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()


def normalise(trainer: Trainer, fit_loop: Counters) -> None:
    """Rewrite `checkpoint["loops"]["fit_loop"]` in place, so that training goes on with what is left to do.

    After a training batch and inside its validation, the validation is left, from its beginning. After
    both, the epoch's end is left if the batch was its last, else the next batch. Between two epochs, the
    next epoch is left.
    """
    batch = fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    logged = fit_loop["epoch_loop.state_dict"]
    epoch = fit_loop["epoch_progress"]["current"]

    for counters in (validation["total"], validation["current"]):
        _fill(counters, 0)
    if epoch["processed"] == epoch["ready"]:
        _begin_next_epoch(fit_loop)
        return

    in_batch_end = batch["current"]["completed"] < batch["current"]["processed"]
    scheduled = _validation_is_scheduled(trainer)
    pending = scheduled and (in_batch_end or inside_validation(trainer))
    last_of_epoch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    # The loggers' step moves on after the batch and its validation.
    if not in_batch_end and not trainer.validating:
        logged["_batches_that_stepped"] -= 1
    if last_of_epoch and not scheduled:
        logged["_batches_that_stepped"] += 1
    # Lightning counts a batch that it finds processed but not completed as done, and its validation too.
    open_batch = 0 if pending or last_of_epoch else 1
    for counters in (batch["total"], batch["current"]):
        counters["completed"] = counters["processed"] - open_batch
    if pending:
        # The counters of a validation that stopped inside its first batch.
        validation["total"]["ready"] = validation["total"]["started"] = 1


def counters_between_batches(trainer: Trainer) -> Counters:
    """The counters to which `set_back` sets training back, read between two batches or before the first."""
    counters: Counters = copy.deepcopy(trainer.fit_loop.state_dict())
    counters["state_dict"].pop("combined_loader", None)  # of which the loader's own state is kept
    for epoch in counters["epoch_progress"].values():
        epoch["ready"] = epoch["started"] = epoch["processed"] + 1  # an epoch stays open between its batches
    return counters


def set_back(trainer: Trainer, counters: Counters) -> None:
    """Let running training go on from `counters_between_batches`; called between two batches.

    The training loader has to be set back as well, before this: it is asked for its next batch anew.
    """
    loop = trainer.fit_loop
    loop.load_state_dict(copy.deepcopy(counters))
    _go_on_without_restart(loop)
    fetcher = loop._data_fetcher
    if fetcher is None:
        raise RuntimeError("training can only be set back while it runs")
    iter(fetcher)
    fetcher.fetched = loop.epoch_loop.batch_progress.current.ready
    trainer.should_stop = False  # what asked for it saw a training that is undone


def take_up_epoch(trainer: Trainer) -> None:
    """Make restored loops go on from an epoch's boundary, as `normalise` left it, when training starts."""
    loop = trainer.fit_loop
    if not loop.epoch_loop.restarting:
        return
    current = loop.epoch_loop.batch_progress.current
    if loop.epoch_progress.current.ready == loop.epoch_progress.current.completed:
        loop.epoch_loop.restarting = False  # the next epoch begins afresh
    elif current.completed >= loop.max_batches and loop._data_fetcher is not None:
        loop._data_fetcher.done = True  # an endless loader would hand out a batch of the next epoch


def logging_step(trainer: Trainer) -> int:
    """Where ``self.log`` puts the values of the batch in training; between batches it has moved on by one."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_values(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Give values to all loggers."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


def _validation_is_scheduled(trainer: Trainer) -> bool:
    """As `validation_is_due`, but leaving out one that runs only because training was told to stop."""
    should_stop, trainer.should_stop = trainer.should_stop, False
    try:
        return validation_is_due(trainer)
    finally:
        trainer.should_stop = should_stop


def _begin_next_epoch(fit_loop: Counters) -> None:
    for counters in fit_loop["epoch_progress"].values():
        _fill(counters, counters["processed"])
    batch = fit_loop["epoch_loop.batch_progress"]
    batch["total"]["completed"] = batch["total"]["processed"]
    _fill(batch["current"], 0)
    batch["is_last_batch"] = False
    # A loader that counts within its epoch stands at the end of the one before.
    fit_loop["state_dict"].pop("combined_loader", None)


def _go_on_without_restart(loop: _Loop) -> None:
    """Take back that counters were loaded, which Lightning understands as a new start of the process."""
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _go_on_without_restart(child)
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    loop.reset_restart_stage()


def _fill(counters: dict[str, int], value: int) -> None:
    for name in counters:
        counters[name] = value
