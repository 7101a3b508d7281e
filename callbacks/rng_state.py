"""Random number generators that a resumed run finds as the uninterrupted one had them."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed

from callbacks.loop_state import validation_is_due

State = dict[str, Any]


class RNGState(Callback):
    """Saves every random number generator in each checkpoint and restores it before the next batch.

    Covered are Python's `random`, numpy's global generator, torch's CPU generator and those of all CUDA
    devices. Put it first among the callbacks: what another draws before it in the same hook is not
    covered.
    """

    def __init__(self) -> None:
        self._to_restore: State | None = None
        self._before_validation: State | None = None

    def state_dict(self) -> State:
        """The generators of all ranks; inside a validation those before it, since it will run again."""
        own = self._before_validation or collect_rng_state()
        if not (distributed.is_available() and distributed.is_initialized()):
            return {"ranks": [own]}
        ranks: list[State] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: State) -> None:
        """Keep the generators until training starts."""
        self._to_restore = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore, for an epoch's end or a validation that comes before the next batch."""
        self._before_validation = None
        if trainer.enable_validation:
            # Making a validation loader draws numbers. Lightning makes it when it is first needed, which
            # after a resume is at another place than in the uninterrupted run.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        self._restore(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore once more, since other callbacks may have drawn numbers at the start of training."""
        self._restore(trainer)
        self._to_restore = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the generators if a validation comes now."""
        if validation_is_due(trainer):
            self._before_validation = collect_rng_state()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation that was left to do has drawn its numbers from the restored generators."""
        if not trainer.sanity_checking:
            self._to_restore = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation is done and will not run again."""
        self._before_validation = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever was drawn at an epoch's end stays drawn."""
        self._to_restore = None

    def _restore(self, trainer: Trainer) -> None:
        if self._to_restore is None:
            return
        ranks = self._to_restore["ranks"]
        if trainer.global_rank < len(ranks):
            set_rng_state(ranks[trainer.global_rank])
        else:
            self._to_restore = None
        if len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint has the random number generators of {len(ranks)} processes and this run has "
                f"{trainer.world_size}: random numbers will differ from the uninterrupted run's"
            )


def collect_rng_state() -> State:
    """The state of every generator of this process, as tensors and primitives."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  # the global generator is the subject here
    _, keys, position, has_gauss, cached_gaussian = numpy_state
    state: State = {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (torch.tensor(keys.tolist()), int(position), int(has_gauss), float(cached_gaussian)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: State) -> None:
    """Put every generator of this process into the state that `collect_rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, position, has_gauss, cached_gaussian = state["numpy"]
    numpy_state = ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    devices = state.get("cuda", [])
    if len(devices) > torch.cuda.device_count():
        rank_zero_warn(
            f"the checkpoint has the generators of {len(devices)} CUDA devices and this process sees "
            f"{torch.cuda.device_count()}: random numbers may differ from the uninterrupted run's"
        )
    for device in range(min(len(devices), torch.cuda.device_count())):
        torch.cuda.set_rng_state(devices[device], device)
