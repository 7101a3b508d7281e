"""What linear maps read in a forward pass, and the gradient of what they gave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from theria.interference.store import Factors


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A module that computes x W^T + b.

    Attributes:
        module: itself.
        weight: W, or its transpose.
        bias: b where it is trained, else None.
        transposed: whether the weight is stored (inputs, outputs).
    """

    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool

    @classmethod
    def of(cls, module: nn.Module) -> "LinearMap":
        """The map of an ``nn.Linear``, or of a Conv1D, which stores its weight the other way round."""
        bias = cast(nn.Parameter | None, module.bias)
        trained = bias if bias is not None and bias.requires_grad else None
        return cls(module, cast(nn.Parameter, module.weight), trained, not isinstance(module, nn.Linear))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and, where it is trained, bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def dtype(self) -> torch.dtype:
        """Of computations with its gradients: float64 where it is of float64, and float32 elsewhere."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def outputs_by_inputs(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (outputs, inputs)."""
        return weight.mT if self.transposed else weight


class _Call(NamedTuple):
    name: str
    inputs: Tensor
    edge: GradientEdge


class Calls:
    """A context that notes every call of some linear maps which autograd follows.

    Calls that gradient checkpointing repeats in the backward come after the context and are not noted.
    """

    def __init__(self, linears: Mapping[str, LinearMap]) -> None:
        self._linears = linears
        self._calls: list[_Call] = []
        self._without_graph: list[str] = []

    def __enter__(self) -> "Calls":
        self._handles = [
            linear.module.register_forward_hook(self._noting(name), with_kwargs=True)
            for name, linear in self._linears.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(
        self, loss: Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[list[tuple[str, Tensor, Tensor]], list[Tensor | None]]:
        """One backward: by call the map's name, its input and the gradient of its output; then parameters'.

        Calls that the loss does not depend on are left out, parameters that it does not are None.

        Raises:
            ValueError: where calls were run by reentrant checkpointing, whose forward has no graph.
        """
        if self._without_graph and _has_node(loss, "CheckpointFunctionBackward"):
            raise ValueError(
                f"{self._without_graph[0]!r} was run by reentrant checkpointing, which hides its gradient "
                "from everything but loss.backward(): checkpoint with use_reentrant=False"
            )
        wanted = [call.edge for call in self._calls] + list(parameters)
        if not wanted:
            return [], []
        # torch's annotations do not know of lists that hold both edges and tensors
        found = torch.autograd.grad(loss, cast(list[Tensor], wanted), allow_unused=True)
        outputs = [
            (call.name, call.inputs, gradient)
            for call, gradient in zip(self._calls, found[: len(self._calls)], strict=True)
            if gradient is not None
        ]
        return outputs, list(found[len(self._calls) :])

    def _noting(self, name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                self._without_graph.append(name)
            elif output.requires_grad:
                inputs = (args or tuple(kwargs.values()))[0]
                # an edge stays right when the output is changed in place afterwards
                self._calls.append(_Call(name, inputs, get_gradient_edge(output)))

        return note


def factors_by_sample(
    calls: Sequence[tuple[str, Tensor, Tensor]], count: int | None, device: torch.device
) -> list[dict[str, Factors]]:
    """Factors of each sample by map, without the tokens at which no map of one input has a gradient.

    Args:
        calls: of `Calls.backward`.
        count: samples that stand in the first dimension; None for one, all dimensions but the last being its.
        device: to keep factors on. Maps that read one tensor share a copy of it.

    Raises:
        ValueError: for calls whose first dimension is not the samples.
    """
    samples = []
    keys = [id(inputs) for _, inputs, _ in calls]
    rows = [(name, _by_sample(x.detach(), count), _by_sample(d, count)) for name, x, d in calls]
    for sample in range(count or 1):
        used: dict[int, Tensor] = {}
        for key, (_, _, outputs) in zip(keys, rows, strict=True):
            seen = (outputs[sample] != 0).any(dim=-1)
            used[key] = used[key] | seen if key in used else seen
        kept: dict[int, Tensor] = {}
        parts: dict[str, list[Factors]] = {}
        for key, (name, inputs, outputs) in zip(keys, rows, strict=True):
            if key not in kept:
                kept[key] = inputs[sample][used[key]].to(device)
            parts.setdefault(name, []).append(Factors(kept[key], outputs[sample][used[key]].to(device)))
        samples.append({name: _joined(found) for name, found in parts.items()})
    return samples


def _has_node(loss: Tensor, name: str) -> bool:
    """Whether a node of that class stands in the graph of a loss."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == name:
            return True
        seen.add(node)
        pending += [earlier for earlier, _ in node.next_functions]
    return False


def _by_sample(x: Tensor, count: int | None) -> Tensor:
    """(samples, tokens, features): leading dimensions of what a map read or gave are tokens of a sample."""
    if count is None:
        return x.reshape(1, -1, x.shape[-1])
    if x.ndim < 2 or x.shape[0] != count:
        raise ValueError(
            f"in a batch of {count} samples the first dimension of every projection must be the samples, "
            f"received {tuple(x.shape)}"
        )
    return x.reshape(count, -1, x.shape[-1])


def _joined(parts: Sequence[Factors]) -> Factors:
    """One map that was called several times."""
    if len(parts) == 1:
        return parts[0]
    return Factors(torch.cat([p.inputs for p in parts]), torch.cat([p.outputs for p in parts]))
