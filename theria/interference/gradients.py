"""Per-sample gradients of attention projections, by hooks on the linear maps."""

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from theria.interference.layout import AttentionLayer
from theria.interference.store import Factors, Gradient, GradientStore, Whole

LossFn = Callable[[nn.Module, Any], Tensor]

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.05
"""Relative difference up to which hooks and autograd are taken to agree; a call that hooks miss is of order 1."""


@dataclass(frozen=True)
class SampleGradients:
    """Gradients of a list of samples with respect to the projections of some attention layers.

    Attributes:
        ids: of the samples.
        layers: numbers of the layers, counted as the layout lists them.
        layout: these layers, reduced to the blocks asked for.
        blocks: which those are.
        biased: modules whose bias is part of the score.
        store: the gradients, one record a sample.
        tokens: of each sample, at which its loss reaches a projection.
        by_autograd: modules whose gradients the hooks do not see whole and autograd gave.
        dtype, device: of the computation of scores.
        memory_bytes: what that computation may hold beside the store.
    """

    ids: tuple[Hashable, ...]
    layers: tuple[int, ...]
    layout: tuple[AttentionLayer, ...]
    blocks: str
    biased: frozenset[str]
    store: GradientStore
    tokens: tuple[int, ...]
    by_autograd: frozenset[str]
    dtype: torch.dtype
    device: torch.device
    memory_bytes: int

    def __len__(self) -> int:
        return len(self.ids)


class _Call(NamedTuple):
    inputs: Tensor
    edge: GradientEdge
    outputs: tuple[int, ...]


def record_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    samples: Sequence[Any],
    modules: Sequence[str],
    store: GradientStore,
    *,
    ids: Sequence[Hashable],
    batch_size: int | None,
    device: torch.device,
) -> tuple[list[int], frozenset[str]]:
    """Run every sample forward and backward once and keep the gradients of the modules' weights and biases.

    A map's gradient for one sample is sum_t d_t x_t^T over its tokens t, x_t what it read and d_t the gradient
    of what it gave. Hooks note x, and one backward gives d for all maps; no weight gradient is formed then.
    The first gradient of every map is compared with autograd's own. Where they differ (a weight that is used
    outside its module, or shared with another), autograd's is kept for all samples instead.

    Args:
        model: run in the mode it is in; dropout makes gradients random, so evaluation mode is wanted.
        loss_fn: as in `compute`.
        samples, ids: what it is called with, and their names in messages.
        modules: dotted names of linear maps.
        store: receives a record a sample. A map without gradient is left out of it; so is one whose gradient is
            not finite, with a warning.
        batch_size: as in `compute`.
        device: where gradients are kept.

    Returns:
        The samples' tokens, and the modules for which autograd's gradients were kept.
    """
    recorder = _Recorder(model, modules, device)
    tokens: list[int] = []
    broken: list[Hashable] = []
    step = 1 if batch_size is None else batch_size
    for first in range(0, len(samples), step):
        batch = samples[first : first + step]
        records = recorder.run(
            loss_fn, batch[0] if batch_size is None else batch, None if batch_size is None else len(batch)
        )
        for (record, count), sample_id in zip(records, ids[first : first + step], strict=True):
            finite = {name: gradient for name, gradient in record.items() if _is_finite(gradient)}
            if len(finite) < len(record):
                broken.append(sample_id)
            store.append(finite)
            tokens.append(count)
    if broken:
        warnings.warn(
            f"{len(broken)} samples have gradients that are not finite, which count as missing: {broken[:10]}",
            stacklevel=3,
        )
    return tokens, frozenset(recorder.by_autograd)


class _Recorder:
    """Notes the calls of linear maps during a forward pass and turns one backward into records."""

    def __init__(self, model: nn.Module, modules: Sequence[str], device: torch.device) -> None:
        self.model = model
        self.device = device
        self.linears = {
            n: model.get_submodule(n) for n in modules if model.get_submodule(n).weight.requires_grad
        }
        self.unchecked = set(self.linears)
        self.by_autograd: set[str] = set()

    def run(self, loss_fn: LossFn, given: Any, count: int | None) -> list[tuple[dict[str, Gradient], int]]:
        """Records and tokens of the samples of one call of the loss."""
        with torch.enable_grad():
            with self._calls() as calls:
                loss = loss_fn(self.model, given)
            _check_loss(loss, count)
            flat = [(name, call) for name, found in calls.items() for call in found]
            whole = {n: self._parameters(n) for n in self.linears if n in self.unchecked | self.by_autograd}
            wanted = [call.edge for _, call in flat] + [p for pair in whole.values() for p in pair]
            if not wanted:
                return [({}, 0) for _ in range(count or 1)]
            found = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
        by_autograd = dict(
            zip(whole, _regrouped(found[len(flat) :], [len(pair) for pair in whole.values()]), strict=True)
        )
        factors = self._factors(flat, found[: len(flat)], count)
        self._check(factors, by_autograd, batched=count is not None)
        return [self._record(sample, by_autograd) for sample in factors]

    @contextmanager
    def _calls(self) -> Iterator[dict[str, list[_Call]]]:
        """Calls of the maps while the context is open: not those that checkpointing repeats in the backward."""
        calls: dict[str, list[_Call]] = {name: [] for name in self.linears}

        def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
            if output.requires_grad:
                inputs = (args or tuple(kwargs.values()))[0]
                # an edge stays right when the output is later changed in place
                calls[name].append(_Call(inputs, get_gradient_edge(output), tuple(output.shape)))

        handles = [
            linear.register_forward_hook(
                lambda _, args, kwargs, output, name=name: note(name, args, kwargs, output), with_kwargs=True
            )
            for name, linear in self.linears.items()
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _parameters(self, name: str) -> tuple[nn.Parameter, ...]:
        """Weight and, where it is trained, bias of a map."""
        linear = self.linears[name]
        return (linear.weight, linear.bias) if has_trained_bias(linear) else (linear.weight,)

    def _factors(
        self, calls: Sequence[tuple[str, _Call]], gradients: Sequence[Tensor | None], count: int | None
    ) -> list[dict[str, Factors]]:
        """Factors of each sample, without the tokens at which no map of the same input has a gradient."""
        samples: list[dict[str, Factors]] = []
        rows = [
            (name, call.inputs, _by_sample(call.inputs.detach(), count), _by_sample(gradient.detach(), count))
            for (name, call), gradient in zip(calls, gradients, strict=True)
            if gradient is not None
        ]
        for sample in range(count or 1):
            used: dict[int, Tensor] = {}
            for _, key, _, outputs in rows:
                seen = (outputs[sample] != 0).any(dim=-1)
                used[id(key)] = used[id(key)] | seen if id(key) in used else seen
            kept: dict[int, Tensor] = {}
            parts: dict[str, list[Factors]] = {}
            for name, key, inputs, outputs in rows:
                if id(key) not in kept:
                    kept[id(key)] = inputs[sample][used[id(key)]].to(self.device)
                parts.setdefault(name, []).append(
                    Factors(kept[id(key)], outputs[sample][used[id(key)]].to(self.device))
                )
            samples.append({name: _joined(found) for name, found in parts.items()})
        return samples

    def _check(
        self,
        factors: Sequence[Mapping[str, Factors]],
        by_autograd: Mapping[str, Sequence[Tensor | None]],
        *,
        batched: bool,
    ) -> None:
        """Compare what hooks saw with autograd, for maps of which that has not been done."""
        for name in sorted(self.unchecked):
            expected = by_autograd[name][0]
            if expected is None or not expected.isfinite().all() or not expected.any():
                continue
            linear = self.linears[name]
            expected = as_outputs_by_inputs(linear, expected.detach()).to(self.device)
            total = torch.zeros_like(expected, dtype=computation_dtype(linear.weight.dtype))
            dtypes = {linear.weight.dtype}
            for found in (sample[name] for sample in factors if name in sample):
                total += found.outputs.to(total).T @ found.inputs.to(total)
                dtypes |= {found.inputs.dtype, found.outputs.dtype}
            tolerance = max(_TOLERANCES.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)
            self.unchecked.discard(name)
            if (total - expected).norm() <= tolerance * expected.norm():
                continue
            if batched:
                raise ValueError(
                    f"the gradient of {name!r} is not the sum over the calls of that module, so samples cannot "
                    "be told apart in a batch; leave batch_size out"
                )
            self.by_autograd.add(name)

    def _record(
        self, factors: Mapping[str, Factors], by_autograd: Mapping[str, Sequence[Tensor | None]]
    ) -> tuple[dict[str, Gradient], int]:
        record: dict[str, Gradient] = {}
        for name, linear in self.linears.items():
            if name in self.by_autograd:
                weight, bias = itertools.islice(itertools.chain(by_autograd[name], (None,)), 2)
                if weight is not None:
                    own = as_outputs_by_inputs(linear, weight.detach()).to(self.device)
                    record[name] = Whole(own, None if bias is None else bias.detach().to(self.device))
            elif name in factors:
                record[name] = _smaller(factors[name], computation_dtype(linear.weight.dtype), linear)
        return record, max((len(f.inputs) for f in factors.values()), default=0)


def computation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, and float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_outputs_by_inputs(linear: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as (outputs, inputs), however the module stores it."""
    return weight if isinstance(linear, nn.Linear) else weight.mT


def has_trained_bias(linear: nn.Module) -> bool:
    """Whether a linear map has a bias that requires a gradient."""
    bias = getattr(linear, "bias", None)
    return isinstance(bias, Tensor) and bias.requires_grad


def _check_loss(loss: Tensor, count: int | None) -> None:
    expected = () if count is None else (count,)
    if not isinstance(loss, Tensor) or tuple(loss.shape) != expected:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        what = "a scalar for one sample" if count is None else f"one loss for each of {count} samples"
        raise ValueError(f"loss_fn must return {what}, a tensor of shape {expected}, received {shape}")
    if not loss.requires_grad:
        raise ValueError("loss_fn returned a loss that depends on no parameter that requires a gradient")


def _by_sample(x: Tensor, count: int | None) -> Tensor:
    """(samples, tokens, features): what a map read or gave, all leading dimensions being tokens of one sample."""
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


def _smaller(factors: Factors, dtype: torch.dtype, linear: nn.Module) -> Gradient:
    """The factors, or the gradient itself where that is smaller."""
    inputs, outputs = factors
    tokens, wide, high = len(inputs), inputs.shape[1], outputs.shape[1]
    if tokens * (wide + high) * inputs.element_size() <= wide * high * dtype.itemsize:
        return factors
    outputs = outputs.to(dtype)
    bias = outputs.sum(dim=0) if has_trained_bias(linear) else None
    return Whole(outputs.T @ inputs.to(dtype), bias)


def _is_finite(gradient: Gradient) -> bool:
    return all(bool(part.isfinite().all()) for part in gradient if part is not None)


def _regrouped(values: Sequence[Any], lengths: Sequence[int]) -> Iterator[Sequence[Any]]:
    """Consecutive groups of the given lengths."""
    ends = list(itertools.accumulate(lengths))
    return (values[end - length : end] for length, end in zip(lengths, ends, strict=True))
