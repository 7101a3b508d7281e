"""Optimiser and scheduler values of the configuration, where they differ from a checkpoint's."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

Values = dict[str, Any]

# What decides which tensors an optimiser keeps.
_DECIDES_STATE = ("amsgrad", "centered")
# Settings that one kind of optimiser has and another has not.
_TELLS_KIND = ("betas", "momentum", "alpha", "rho", "lambd", "etas", "lr_decay", "max_iter")
# Of a scheduler's state, what follows from the optimiser's learning rates.
_DERIVED = ("base_lrs", "_last_lr")


class ConfiguredOptimizerValues(Callback):
    """After a resume, applies the optimiser values that are configured otherwise than the saved run's were.

    Restoring an optimiser brings back its checkpoint's learning rate, decay and all. So each checkpoint
    also records the values as they were configured, before training or a scheduler changed them; on
    resume exactly those that are configured otherwise now are set. An unchanged configuration changes
    nothing. A learning rate that a scheduler moved from its configured value is moved by the same factor
    from the new one. A checkpoint without a record is taken to have been configured as it was saved.

    Values inside `SequentialLR` and `ChainedScheduler` stay the checkpoint's.
    """

    def __init__(self) -> None:
        self._configured: Values = {}
        self._recorded: Values = {}

    def state_dict(self) -> Values:
        """The configured values of every parameter group and scheduler."""
        return self._configured

    def load_state_dict(self, state_dict: Values) -> None:
        """Keep what was configured when the checkpoint was written."""
        self._recorded = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the configured values while optimisers and schedulers are new."""
        self._configured = {"optimizers": _group_values(trainer), "schedulers": _scheduler_values(trainer)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set what is configured otherwise than it was; in a fresh run nothing is."""
        recorded, self._recorded = self._recorded, {}
        now = self._configured
        groups = recorded.get("optimizers") or _group_values(trainer)
        for optimizer, then_groups, now_groups in zip(
            trainer.optimizers, groups, now["optimizers"], strict=False
        ):
            # Groups may share one tensor, so the restored rates are read before any is set.
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            for index, (then, configured) in enumerate(zip(then_groups, now_groups, strict=False)):
                owner = f"{type(optimizer).__name__}, parameter group {index}"
                _check_same_kind(owner, then, configured)
                for name, value in _changed(owner, then, configured):
                    if name == "lr":
                        moved = _moved_alike(rates[index], then.get(name), value)
                        _set_learning_rate(trainer, optimizer, index, moved, value)
                    else:
                        _set_in_group(optimizer, index, name, value)
        for config, then, configured in zip(
            trainer.lr_scheduler_configs, recorded.get("schedulers", []), now["schedulers"], strict=False
        ):
            for name, value in _changed(type(config.scheduler).__name__, then, configured):
                setattr(config.scheduler, name, value)


def _group_values(trainer: Trainer) -> list[list[Values]]:
    """Per optimiser and group what it is configured with; a scheduler keeps its rate as `initial_lr`."""
    return [
        [
            _primitives(
                {**group, "lr": group.get("initial_lr", group["lr"])}, leave_out=("params", "initial_lr")
            )
            for group in optimizer.param_groups
        ]
        for optimizer in trainer.optimizers
    ]


def _scheduler_values(trainer: Trainer) -> list[Values]:
    return [_primitives(config.scheduler.state_dict(), _DERIVED) for config in trainer.lr_scheduler_configs]


def _primitives(values: Mapping[str, Any], leave_out: tuple[str, ...]) -> Values:
    numbers = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}
    return {name: value for name, value in numbers.items() if name not in leave_out and _is_primitive(value)}


def _is_primitive(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(_is_primitive(item) for item in value)
    return type(value) in (bool, int, float, str, Counter)


def _check_same_kind(owner: str, then: Values, now: Values) -> None:
    """Refuse an optimiser that would not find its state in what another kind of optimiser saved."""
    differing = [name for name in _DECIDES_STATE if then.get(name) != now.get(name)]
    differing += [name for name in _TELLS_KIND if (name in then) != (name in now)]
    if differing:
        raise MisconfigurationException(
            f"{owner} differs from the checkpoint's optimiser in {', '.join(differing)}, so its saved state"
            " does not fit: keep the optimiser, or start a new run"
        )


def _changed(owner: str, then: Values, now: Values) -> Iterator[tuple[str, Any]]:
    for name, value in now.items():
        if name not in then or then[name] != value:
            rank_zero_info(f"{owner}: {name} is {value} as configured, not the checkpoint's {then.get(name)}")
            yield name, value


def _moved_alike(restored: float, then: float | None, now: float) -> float:
    """The new rate, moved from its configured value by as much as a scheduler had moved the old one."""
    return now * restored / then if then and restored != then else now


def _set_learning_rate(
    trainer: Trainer, optimizer: Optimizer, index: int, rate: float, configured: float
) -> None:
    group = optimizer.param_groups[index]
    _assign(group, "lr", rate)
    if "initial_lr" in group:
        _assign(group, "initial_lr", configured)
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer and hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs[index] = configured


def _set_in_group(optimizer: Optimizer, index: int, name: str, value: Any) -> None:
    group = optimizer.param_groups[index]
    _assign(group, name, value)
    if name in ("capturable", "fused") and value:
        # These keep their step counters on the device of the parameters, where the restored ones may not be.
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device)


def _assign(group: dict[str, Any], name: str, value: Any) -> None:
    current = group.get(name)
    if isinstance(current, Tensor):
        current.fill_(value)  # a captured graph reads this tensor
    else:
        group[name] = value
