"""The public functions: gradients of samples, and scores of their pairs."""

import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from theria.interference.assembly import assembled
from theria.interference.detection import detect_layout, layout_from
from theria.interference.fisher import FISHERS, Ridge, as_ridge, samples_behind
from theria.interference.gradients import LossFn, SampleGradients, record_gradients
from theria.interference.hooks import LinearMap
from theria.interference.layout import AttentionLayer
from theria.interference.precision import full_precision
from theria.interference.result import InterferenceResult
from theria.interference.scores import VARIANTS, check_variants
from theria.interference.selection import select_heads, select_layers
from theria.interference.store import GradientStore
from theria.interference.streaming import BlockScores, Buffers, Settings, block_scores

Layout = Mapping[str, Any] | Sequence[AttentionLayer]


def compute(
    model: nn.Module,
    loss_fn: LossFn,
    samples_a: Iterable[Any],
    samples_b: Iterable[Any],
    *,
    ids_a: Iterable[Hashable] | None = None,
    ids_b: Iterable[Hashable] | None = None,
    variants: Sequence[str] = VARIANTS,
    fisher: str = "a",
    ridge: Ridge | float | int = Ridge(),  # noqa: B008 (immutable)
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    blocks: str | None = None,
    layout: Layout | None = None,
    min_samples_for_fisher: int = 10,
    computation_device: str = "cpu",
    memory_budget_mib: float | int = 2048,
    per_head: bool = True,
    batch_size: int | None = None,
    spill_directory: Path | None = None,
) -> InterferenceResult:
    """Scores of every sample of task A against every sample of task B, by block, layer and head.

    Equations and their meaning stand in `theria.interference`. Gradients are taken at the model's parameters
    in the mode it is in; put it into evaluation mode where dropout is not wanted. Neither parameters nor
    their ``.grad`` are changed. A sample whose loss has no gradient in a layer's block, none that is finite
    or none whose squares are (above 1e16 in float32), has NaN for scores there and counts nowhere else.

    Args:
        model: any module with attention, see ``layout``.
        loss_fn: ``loss_fn(model, sample)``, a scalar; with ``batch_size``, ``loss_fn(model, samples)`` for a
            list of so many at most, one loss for each, the samples being the first dimension of what every
            projection reads (padded as needed).
        samples_a, samples_b: whatever ``loss_fn`` takes.
        ids_a, ids_b: names of the samples, hashable and distinct within a task; positions by default.
        variants: among "directional", "signed" and "symmetric".
        fisher: "a", "pooled" or "pooled_n", see `pooled_fisher`.
        ridge: see `Ridge`; a number is an absolute one.
        layers: numbers of layers to look at, counted as the layout lists them; all by default.
        heads: query heads to look at; in K and V those that serve them. All by default.
        blocks: letters among Q, K, V and O; by default all that the model's layers have.
        layout: a mapping as for `layout_from`, or layers; found with `detect_layout` by default.
        min_samples_for_fisher: a warning is given where a mean in the Fisher information has fewer samples.
        computation_device: of gradients kept and of scores; "auto" is cuda where there is one. Results of
            "cpu" are the same from run to run.
        memory_budget_mib: held beside the model, its own forward and backward, and the result. Half is for
            gradients of samples, which go to memory-mapped files beyond it, half for the computation.
        per_head: False takes each block as one, and the last axis of the scores has length 1.
        batch_size: samples a backward; None for one, with a scalar loss.
        spill_directory: for these files; the system's temporary directory by default.

    Raises:
        ValueError: for arguments that do not fit the model or one another; the message names them.
    """
    samples_a, samples_b = list(samples_a), list(samples_b)
    ids = (*_ids("ids_a", ids_a, len(samples_a)), *_ids("ids_b", ids_b, len(samples_b)))
    _check_settings(variants, fisher)
    gradients = collect(
        model,
        loss_fn,
        [*samples_a, *samples_b],
        ids=ids,
        layers=layers,
        blocks=blocks,
        layout=layout,
        computation_device=computation_device,
        memory_budget_mib=memory_budget_mib,
        batch_size=batch_size,
        spill_directory=spill_directory,
    )
    return score(
        gradients,
        range(len(samples_a)),
        range(len(samples_a), len(ids)),
        variants=variants,
        fisher=fisher,
        ridge=ridge,
        heads=heads,
        min_samples_for_fisher=min_samples_for_fisher,
        per_head=per_head,
    )


def collect(
    model: nn.Module,
    loss_fn: LossFn,
    samples: Iterable[Any],
    *,
    ids: Iterable[Hashable] | None = None,
    layers: Sequence[int] | None = None,
    blocks: str | None = None,
    layout: Layout | None = None,
    computation_device: str = "cpu",
    memory_budget_mib: float | int = 2048,
    batch_size: int | None = None,
    spill_directory: Path | None = None,
) -> SampleGradients:
    """Gradients of samples, for as many calls of `score` as are wanted; arguments as in `compute`."""
    samples = list(samples)
    names = tuple(range(len(samples))) if ids is None else tuple(ids)
    if len(names) != len(samples):
        raise ValueError(f"{len(names)} ids were given for {len(samples)} samples")
    if memory_budget_mib <= 0:
        raise ValueError(f"memory_budget_mib must be above 0, received {memory_budget_mib}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, received {batch_size}")
    device = _device(computation_device)
    numbers, chosen, letters = select_layers(_layers(model, layout), layers, blocks)
    modules = dict.fromkeys(p.module for layer in chosen for p in layer.projections.values())
    linears = {name: LinearMap.of(model.get_submodule(name)) for name in modules}
    half = int(memory_budget_mib * 2**20 / 2)
    store = GradientStore(half, spill_directory)
    tokens, by_autograd = record_gradients(
        model, loss_fn, samples, list(modules), store, ids=names, batch_size=batch_size, device=device
    )
    return SampleGradients(
        ids=names,
        layers=numbers,
        layout=chosen,
        blocks=letters,
        biased=frozenset(n for n, linear in linears.items() if linear.bias is not None),
        store=store,
        tokens=tuple(tokens),
        by_autograd=by_autograd,
        dtype=max((linear.dtype for linear in linears.values()), key=lambda dtype: dtype.itemsize),
        device=device,
        memory_bytes=half,
    )


def score(
    gradients: SampleGradients,
    task_a: range,
    task_b: range,
    *,
    variants: Sequence[str] = VARIANTS,
    fisher: str = "a",
    ridge: Ridge | float | int = Ridge(),  # noqa: B008 (immutable)
    heads: Sequence[int] | None = None,
    min_samples_for_fisher: int = 10,
    per_head: bool = True,
) -> InterferenceResult:
    """Scores of some samples against some others, whose gradients have been taken; arguments as in `compute`.

    Args:
        gradients: of `collect`.
        task_a, task_b: ranges of step 1 of its samples. They may overlap or be the same.
    """
    _check_settings(variants, fisher)
    for name, task in (("task_a", task_a), ("task_b", task_b)):
        if task.step != 1 or task.start < 0 or task.stop > len(gradients):
            raise ValueError(
                f"{name} must be a range of step 1 within {len(gradients)} samples, received {task}"
            )
        _check_distinct(name, gradients.ids[task.start : task.stop])
    settings = Settings(task_a, task_b, variants, fisher, as_ridge(ridge))
    chosen = select_heads(gradients.layout, heads, per_head=per_head)
    _warn(settings, min_samples_for_fisher)
    collected: dict[str, list[BlockScores]] = {block: [] for block in gradients.blocks}
    if task_a and task_b:
        buffers = Buffers()
        with full_precision(gradients.device):
            for layer in gradients.layout:
                for block, projection in layer.projections.items():
                    features = projection.features[chosen[block].places]
                    features = features if per_head else features.reshape(1, -1)
                    collected[block].append(block_scores(gradients, projection, features, settings, buffers))
    names = {block: found.names for block, found in chosen.items()}
    return assembled(gradients, settings, names, collected)


def _ids(name: str, ids: Iterable[Hashable] | None, count: int) -> tuple[Hashable, ...]:
    if ids is None:
        return tuple(range(count))
    given = tuple(ids)
    if len(given) != count:
        raise ValueError(f"{name} must name every sample: received {len(given)} ids for {count} samples")
    _check_distinct(name, given)
    return given


def _check_distinct(name: str, ids: Sequence[Hashable]) -> None:
    repeated = [sample_id for sample_id, times in Counter(ids).items() if times > 1]
    if repeated:
        raise ValueError(f"{name} names several samples by the same id: {repeated[:10]}")


def _check_settings(variants: Sequence[str], fisher: str) -> None:
    check_variants(variants)
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(FISHERS)}, received {fisher!r}")


def _layers(model: nn.Module, layout: Layout | None) -> tuple[AttentionLayer, ...]:
    if layout is None:
        return detect_layout(model)
    return layout_from(model, layout) if isinstance(layout, Mapping) else tuple(layout)


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda", "auto"):
        raise ValueError(f"computation_device must be cpu, cuda or auto, received {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("computation_device is cuda, but no CUDA device is available")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _warn(settings: Settings, min_samples_for_fisher: int) -> None:
    """Say where there is nothing to score, or little to take a mean over."""
    empty = [name for name, task in (("A", settings.task_a), ("B", settings.task_b)) if not task]
    if empty:
        warnings.warn(f"task {' and task '.join(empty)} has no samples: there are no scores", stacklevel=4)
        return
    behind = samples_behind(settings.fisher, len(settings.task_a), len(settings.task_b))
    if behind < min_samples_for_fisher:
        warnings.warn(
            f"the Fisher information {settings.fisher!r} is a mean over {behind} samples, fewer than "
            f"min_samples_for_fisher={min_samples_for_fisher}",
            stacklevel=4,
        )
