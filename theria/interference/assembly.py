"""Arrays of a result from the scores of its blocks."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from theria.interference.gradients import SampleGradients
from theria.interference.result import BlockDiagnostics, Head, InterferenceResult
from theria.interference.streaming import BlockScores, Settings


def assembled(
    gradients: SampleGradients,
    settings: Settings,
    heads: Mapping[str, tuple[Head, ...]],
    found: Mapping[str, Sequence[BlockScores]],
) -> InterferenceResult:
    """The result; ``found`` has the layers' scores by block, or nothing where a task is empty."""
    task_a, task_b = settings.task_a, settings.task_b
    pairs = (len(task_a), len(task_b), len(gradients.layers))
    both = min(task_a.start, task_b.start)
    rows_a, rows_b = (slice(task.start - both, task.stop - both) for task in (task_a, task_b))
    dtype = torch.empty(0, dtype=gradients.dtype).numpy().dtype
    scores: dict[str, dict[str, np.ndarray]] = {variant: {} for variant in settings.variants}
    missing_a, missing_b, diagnostics = {}, {}, {}
    for block, names in heads.items():
        layers = found[block]
        if layers:
            missing = _stacked(layers, lambda layer: layer.missing, axis=1)
            missing_a[block], missing_b[block] = missing[rows_a], missing[rows_b]
        else:
            missing_a[block], missing_b[block] = (np.zeros((n, pairs[2]), dtype=bool) for n in pairs[:2])
        absent = missing_a[block][:, None] | missing_b[block][None]
        for variant, by_block in scores.items():
            by_block[block] = np.empty((*pairs, len(names)), dtype=dtype)
            for number, layer in enumerate(layers):
                by_block[block][:, :, number] = layer.scores[variant].permute(1, 2, 0).cpu().numpy()
            by_block[block][absent] = np.nan
        signed = scores["signed"][block] if "signed" in scores else None
        diagnostics[block] = _diagnostics(layers, rows_a, rows_b, signed, (*pairs, len(names)))
    return InterferenceResult(
        scores=scores,
        ids_a=gradients.ids[task_a.start : task_a.stop],
        ids_b=gradients.ids[task_b.start : task_b.stop],
        layers=gradients.layers,
        layer_names=tuple(layer.name for layer in gradients.layout),
        heads=heads,
        missing_a=missing_a,
        missing_b=missing_b,
        tokens_a=np.array(gradients.tokens[task_a.start : task_a.stop], dtype=np.int64),
        tokens_b=np.array(gradients.tokens[task_b.start : task_b.stop], dtype=np.int64),
        fisher=settings.fisher,
        ridge=settings.ridge,
        diagnostics=diagnostics,
    )


def _diagnostics(
    layers: Sequence[BlockScores],
    rows_a: slice,
    rows_b: slice,
    signed: np.ndarray | None,
    shape: tuple[int, int, int, int],
) -> BlockDiagnostics:
    """Figures of one block; NaN where a task is empty, and for samples without gradient."""
    samples_a, samples_b, depth, heads = shape
    if not layers:
        unknown = np.full((depth, heads), np.nan)
        l1_a, l1_b = (np.full((count, depth, heads), np.nan) for count in (samples_a, samples_b))
        negative = None if signed is None else unknown
        return BlockDiagnostics(l1_a, l1_b, l1_b, unknown, unknown, unknown, unknown, negative)
    missing = _stacked(layers, lambda layer: layer.missing, axis=1)
    l1_a, l1_b, live_l1_b = (
        _stacked(layers, part, axis=1)
        for part in (lambda layer: layer.l1_a, lambda layer: layer.l1_b, lambda layer: layer.live_l1_b)
    )
    l1_a[missing[rows_a]] = l1_b[missing[rows_b]] = live_l1_b[missing[rows_b]] = np.nan
    size = np.array([[layer.size] * heads for layer in layers])
    negative = None
    if signed is not None:
        negative = _share((signed < 0).sum(axis=(0, 1)), np.isfinite(signed).sum(axis=(0, 1)))
    return BlockDiagnostics(
        gradient_l1_a=l1_a,
        gradient_l1_b=l1_b,
        live_l1_b=live_l1_b,
        slice_size=size,
        ridge_share=_share(_stacked(layers, lambda layer: layer.exceeded, axis=0), size),
        clamped_share=_share(_stacked(layers, lambda layer: layer.clamped, axis=0), size),
        zero_share=_share(_stacked(layers, lambda layer: layer.zero, axis=0), size),
        negative_share=negative,
    )


def _share(count: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The quotient; NaN where there is nothing to take a share of."""
    return np.divide(count, of, out=np.full(np.shape(of), np.nan), where=np.asarray(of) > 0)


def _stacked(
    layers: Sequence[BlockScores], part: Callable[[BlockScores], Tensor], *, axis: int
) -> np.ndarray:
    return np.stack([part(layer).cpu().numpy() for layer in layers], axis=axis)
