"""FSDP on Lightning's engine: parameters, gradients and optimiser divided, checkpoints as of one device."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from callbacks.sharded_parameters import whole_tensor


class FullyShardedStrategy(ModelParallelStrategy):
    """Divides parameters, gradients and optimiser states over all processes (``fully_shard``).

    It is Lightning's ``ModelParallelStrategy`` over one dimension, that of the data, with two differences.
    Checkpoints are those of one device, whole and in one file of the trainer's ``CheckpointIO``, so that
    training goes on from them on any number of devices and with any strategy; rank zero gathers them in its
    host's memory. And a run starts as all others do, with weights restored before ``on_fit_start``.

    In a configuration it is ``trainer.strategy: fully_sharded``. The module divides itself in
    ``configure_model`` with `divide`. Precision is the trainer's: with bf16-mixed, weights are gathered and
    gradients are averaged in float32, as on one device.

    Raises:
        MisconfigurationException: the module does not divide itself or compiles its forward, or a callback
            reads whole parameters.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: the module is divided before the strategy is set up."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes, through `load_optimizer_state_dict`."""
        return True

    @property
    def data_mesh(self) -> DeviceMesh:
        """All processes in one row, over which `divide` divides (two rows would stand for copies)."""
        return self.device_mesh["data_parallel"]

    def check(self, model: LightningModule, callbacks: Sequence[Callback]) -> None:
        """Refuse what does not go together with divided parameters, before anything is started.

        Raises:
            MisconfigurationException: as the class says.
        """
        if not is_overridden("configure_model", model):
            raise MisconfigurationException(
                f"{type(model).__name__} cannot be divided by {type(self).__name__}: set trainer.strategy to "
                "ddp"
            )
        if getattr(model, "compile_forward", False):
            raise MisconfigurationException(
                f"compile takes the forward as one function, past the blocks that {type(self).__name__} "
                "divides: set model.compile to false, or trainer.strategy to ddp"
            )
        for callback in callbacks:
            if getattr(callback, "needs_whole_parameters", False):
                raise MisconfigurationException(
                    f"{type(callback).__name__} reads whole parameters or their gradients, which "
                    f"{type(self).__name__} divides: leave the callback out, or set trainer.strategy to ddp"
                )

    def setup_environment(self) -> None:
        """Start the processes' group; all of them divide the data and the parameters."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Refuse what does not go together, then set up."""
        self.check(trainer.lightning_module, trainer.callbacks)  # type: ignore[attr-defined]  # set outside of its body
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state on rank zero, on the host; every rank has to ask."""
        if self.lightning_module is None:
            raise RuntimeError("there is no module yet")
        return self._gathered(self.lightning_module.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its part of a whole state."""
        if self.lightning_module is None:
            raise RuntimeError("there is no module yet")
        own = self.lightning_module.state_dict()
        parts = {
            name: _divided_like(own[name], value) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(parts, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank zero, in the form of an optimiser on one device; every rank has to ask."""
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._gathered(own.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its part of whole states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            if len(numbers) != len(parameters):
                raise MisconfigurationException(
                    f"the checkpoint's optimiser has {len(numbers)} parameters and this one {len(parameters)}"
                    ": use the configuration of its run"
                )
            parts = {
                number: {
                    name: _divided_like(parameter, value) for name, value in state["state"][number].items()
                }
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state["state"]
            }
            optimizer.load_state_dict({**state, "state": parts})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole checkpoint, on every rank's host."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def _gathered(self, value: Any) -> Any:
        """The same nest of dictionaries with whole tensors on the host, empty except on rank zero."""
        if isinstance(value, Mapping):
            found = {name: self._gathered(part) for name, part in value.items()}
            return found if self.is_global_zero else {}
        if isinstance(value, Tensor):
            whole = whole_tensor(value.detach())
            return whole.cpu() if self.is_global_zero else None
        return value


# its name in configurations
StrategyRegistry.register("fully_sharded", FullyShardedStrategy, FullyShardedStrategy.__doc__, override=True)


def divide(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Divide a model over a mesh, each of its blocks by itself; a second time does nothing.

    A block's parameters are whole while it computes, what the model has outside of them from the begin of a
    forward pass to the end of the backward pass.
    """
    if isinstance(model, FSDPModule):
        return
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _divided_like(own: Any, value: Any) -> Any:
    """This rank's part of a whole tensor of the shape of one of its own; anything else as it is."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    # every rank has the whole, so nothing need be sent
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
