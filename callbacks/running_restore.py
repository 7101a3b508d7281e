"""Setting running training back to a checkpoint, in the same process and in the middle of an epoch."""

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

from callbacks import loop_state
from callbacks.optimizer_values import ConfiguredOptimizerValues
from callbacks.rng_state import RNGState, set_rng_state

KEY = "running_restore"


@runtime_checkable
class SkippableLoader(Protocol):
    """A training loader whose batches are numbered, as ``datamodules.loader.ResumableLoader``."""

    @property
    def last_batch(self) -> int | None:
        """Number of the batch handed out last."""

    @property
    def skipped(self) -> list[range]:
        """Numbers of the batches that are passed over."""

    def skip(self, batches: range) -> None:
        """Pass over these batches from now on."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position."""


def add_running_state(trainer: Trainer, loader: SkippableLoader, checkpoint: dict[str, Any]) -> None:
    """Add what `restore_running` needs and a resume does not; every rank has to call it."""
    checkpoint[KEY] = {
        "counters": loop_state.counters_between_batches(trainer),
        "loader": loader.state_dict(),
        "generators": RNGState().state_dict()["ranks"],
    }


def restore_running(
    trainer: Trainer, loader: SkippableLoader, checkpoint: dict[str, Any], *, leave_out: Callback
) -> None:
    """Set training back, between two batches, to a checkpoint of this process or of one that it resumed.

    That is: weights and buffers, optimisers, schedulers, gradient scaler, loops, the position of the training
    loader, every random number generator, and what other callbacks keep. Callbacks that write checkpoints
    keep their own books. Batches that are being skipped stay skipped.

    Args:
        trainer: in the middle of a fit.
        loader: its training loader.
        checkpoint: with what `add_running_state` adds.
        leave_out: the callback that asks for it.
    """
    own = checkpoint[KEY]
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    connector.restore_model()
    connector.restore_precision_plugin_state()
    connector.restore_optimizers_and_schedulers()
    connector._loaded_checkpoint = {}
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    _restore_callbacks(trainer, checkpoint, leave_out)

    skipped = loader.skipped  # before the position is set, with which the loader forgets them
    loader.load_state_dict(own["loader"])
    for batches in skipped:
        loader.skip(batches)
    loop_state.set_back(trainer, own["counters"])
    set_rng_state(own["generators"][trainer.global_rank])


def _restore_callbacks(trainer: Trainer, checkpoint: dict[str, Any], leave_out: Callback) -> None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its class body
    for callback in callbacks:
        if callback is leave_out or isinstance(callback, Checkpoint | RNGState):
            continue
        # what a callback keeps beside its state, as an average of the weights
        callback.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
        if not (state := checkpoint["callbacks"].get(callback.state_key)):
            continue
        callback.load_state_dict(state)
        if isinstance(callback, ConfiguredOptimizerValues):
            # a checkpoint from before a resume may have been configured otherwise
            callback.on_train_start(trainer, trainer.lightning_module)
