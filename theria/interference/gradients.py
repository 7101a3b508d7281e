"""Per-sample gradients of attention projections."""

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from theria.interference.hooks import Calls, LinearMap, factors_by_sample
from theria.interference.layout import AttentionLayer
from theria.interference.precision import full_precision
from theria.interference.store import Factors, Gradient, GradientStore, Whole

LossFn = Callable[[Any, Any], Tensor]

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.05
"""Relative difference up to which hooks and autograd agree; a call that hooks miss makes one of order 1."""


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

    A map's gradient for one sample is sum_t d_t x_t^T over its tokens t, x_t what it read and d_t the
    gradient of what it gave. Hooks note x, and one backward gives d for all maps; no weight gradient is
    formed. The first gradient of every map is compared with autograd's own. Where they differ (a weight that
    is used outside its module, or shared with another), autograd's is kept for all samples instead.

    Args:
        model: run in the mode it is in; dropout makes gradients random, so evaluation mode is wanted.
        loss_fn: as in `compute`.
        samples, ids: what it is called with, and their names in messages.
        modules: dotted names of linear maps.
        store: receives a record a sample. A map without gradient is left out of it; so is one whose gradient
            is not finite or too large to be squared, with a warning.
        batch_size: as in `compute`.
        device: where gradients are kept.

    Returns:
        The samples' tokens, and the modules for which autograd's gradients were kept.
    """
    recorder = _Recorder(model, modules, device)
    tokens: list[int] = []
    broken: list[Hashable] = []
    step = batch_size or 1
    for first in range(0, len(samples), step):
        batch = samples[first : first + step]
        if batch_size is None:
            records = recorder.run(loss_fn, batch[0], None)
        else:
            records = recorder.run(loss_fn, batch, len(batch))
        for sample_id, (record, count) in zip(ids[first : first + step], records, strict=True):
            finite = {name: g for name, g in record.items() if _is_squarable(g, recorder.linears[name].dtype)}
            if len(finite) < len(record):
                broken.append(sample_id)
            store.append(finite)
            tokens.append(count)
    if broken:
        warnings.warn(
            f"{len(broken)} samples have gradients that are not finite or too large to be squared, and "
            f"count as missing: {broken[:10]}",
            stacklevel=4,
        )
    return tokens, frozenset(recorder.by_autograd)


class _Recorder:
    """Turns one forward and one backward into records of the samples."""

    def __init__(self, model: nn.Module, modules: Sequence[str], device: torch.device) -> None:
        self.model = model
        self.device = device
        linears = {name: LinearMap.of(model.get_submodule(name)) for name in modules}
        self.linears = {name: linear for name, linear in linears.items() if linear.weight.requires_grad}
        self.unchecked = set(self.linears)
        self.by_autograd: set[str] = set()

    def run(self, loss_fn: LossFn, given: Any, count: int | None) -> list[tuple[dict[str, Gradient], int]]:
        """Records and tokens of the samples of one call of the loss; ``count`` None for one sample."""
        with torch.enable_grad():
            with Calls(self.linears) as calls:
                loss = loss_fn(self.model, given)
            _check_loss(loss, count)
            asked = sorted(self.unchecked | self.by_autograd)
            parameters = {name: self.linears[name].parameters for name in asked}
            # a loss that left its autocast is differentiated outside of it, as by loss.backward() there
            with torch.autocast(loss.device.type, enabled=False):
                outputs, found = calls.backward(loss.sum(), [p for pair in parameters.values() for p in pair])
        remaining = iter(found)
        own = {name: [next(remaining) for _ in pair] for name, pair in parameters.items()}
        factors = factors_by_sample(outputs, count, self.device)
        with full_precision(self.device):
            for name in sorted(self.unchecked):
                self._check(
                    name, [f[name] for f in factors if name in f], own[name][0], batched=count is not None
                )
            return [self._record(sample, own) for sample in factors]

    def _check(
        self, name: str, factors: Sequence[Factors], expected: Tensor | None, *, batched: bool
    ) -> None:
        """Compare what hooks saw of a map with autograd, unless there is nothing to compare yet."""
        if expected is None or not expected.isfinite().all() or not expected.any():
            return
        linear = self.linears[name]
        expected = linear.outputs_by_inputs(expected).to(self.device)
        total = torch.zeros_like(expected, dtype=linear.dtype)
        dtypes = {linear.weight.dtype}
        for found in factors:
            total += found.outputs.to(total).T @ found.inputs.to(total)
            dtypes |= {found.inputs.dtype, found.outputs.dtype}
        tolerance = max(_TOLERANCES.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)
        self.unchecked.discard(name)
        if (total - expected).norm() <= tolerance * expected.norm():
            return
        if batched:
            raise ValueError(
                f"the gradient of {name!r} is not the sum over the calls of that module, so samples cannot "
                "be told apart in a batch; leave batch_size out"
            )
        self.by_autograd.add(name)

    def _record(
        self, factors: Mapping[str, Factors], own: Mapping[str, Sequence[Tensor | None]]
    ) -> tuple[dict[str, Gradient], int]:
        """What is kept of one sample, and its tokens."""
        record: dict[str, Gradient] = {}
        for name, linear in self.linears.items():
            if name in self.by_autograd:
                gradients = [g.to(self.device) for g in own[name] if g is not None]
                if len(gradients) == len(own[name]):
                    weight = linear.outputs_by_inputs(gradients[0])
                    record[name] = Whole(weight, gradients[1] if len(gradients) > 1 else None)
            elif name in factors:
                record[name] = _smaller(factors[name], linear)
        return record, max((len(f.inputs) for f in factors.values()), default=0)


def _check_loss(loss: Any, count: int | None) -> None:
    """Raise ValueError for a loss that is not one number a sample, or that no parameter moves."""
    expected = () if count is None else (count,)
    shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    if shape != expected:
        what = "a scalar for one sample" if count is None else f"one loss for each of {count} samples"
        raise ValueError(f"loss_fn must return {what}, a tensor of shape {expected}, received {shape}")
    if not loss.requires_grad:
        raise ValueError("loss_fn returned a loss that depends on no parameter that requires a gradient")


def _smaller(factors: Factors, linear: LinearMap) -> Gradient:
    """The factors, or the gradient itself where that is smaller."""
    inputs, outputs = factors
    dtype = linear.dtype
    tokens, wide, high = len(inputs), inputs.shape[1], outputs.shape[1]
    if tokens * (wide + high) * inputs.element_size() <= wide * high * dtype.itemsize:
        return factors
    outputs = outputs.to(dtype)
    bias = outputs.sum(dim=0) if linear.bias is not None else None
    return Whole(outputs.T @ inputs.to(dtype), bias)


def _is_squarable(gradient: Gradient, dtype: torch.dtype) -> bool:
    """Whether sums of its squares over some 10^6 samples are finite, by a bound on its norm."""
    first, second = gradient
    if isinstance(gradient, Factors):
        # a bias reads 1 at every token
        bound = math.hypot(_norm(first), len(first) ** 0.5) * _norm(gradient.outputs)
    else:
        bound = math.hypot(_norm(first), 0.0 if second is None else _norm(second))
    return bound < math.sqrt(torch.finfo(dtype).max) / 2**10


def _norm(part: Tensor) -> float:
    return float(torch.linalg.vector_norm(part, dtype=torch.float64))
