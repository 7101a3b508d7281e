"""A few outer steps of MAML through an attention callable: does it run, and is its second order there?"""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from theria.attention import registered_backend
from theria.curvature.convention import Attention, Convention, as_backend
from theria.curvature.derivatives import Failure
from theria.curvature.probes import (
    SecondOrderPath,
    relative_difference,
    second_order_path,
)
from theria.curvature.signal import ATTENTION, reference_twin
from theria.maml import MetaMode, meta_gradient
from theria.maml.task_model import Batch
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

_HEAD = ("head",)

PATHS = {"": (*ATTENTION, *_HEAD), "attn": ATTENTION, "head": _HEAD}
"""Suffix of the column -> modules through which the second-order path leads."""

_BACKEND = "the attention under audit"


@dataclass(frozen=True)
class MetaTask:
    """The meta-learning problem of an audit; the defaults are those of the frozen study.

    Attributes:
        spec: the task, see `SeqClsSpec`.
        tasks: tasks in a meta-batch.
        inner_lr: rate of the inner gradient descent.
        outer_lr: rate of Adam.
    """

    spec: SeqClsSpec = field(default_factory=SeqClsSpec)
    tasks: int = 16
    inner_lr: float = 0.4
    outer_lr: float = 1e-3


SMALL_TASK = MetaTask(
    SeqClsSpec(length=6, width=16, num_classes=2, num_signal_positions=2, support_size=2, query_size=2),
    tasks=1,
)
"""Two sequences: for implementations that take milliseconds a tile, as kernels do under an interpreter."""


@dataclass(frozen=True)
class StepProbe:
    """One outer step.

    Attributes:
        rel_diff: |g_FULL - g_FO| / |g_FULL| through the callable.
        reference_rel_diff: the same through the explicit softmax in float64, at the same parameters.
        full_error: |g_FULL - g_ref| / |g_ref|, g_ref the reference's FULL meta-gradient.
        first_order_error: the same of FO.
        paths: suffix of `PATHS` -> the second-order path.
    """

    rel_diff: float
    reference_rel_diff: float
    full_error: float
    first_order_error: float
    paths: dict[str, SecondOrderPath]


@dataclass(frozen=True)
class DepthProbe:
    """MAML with so many inner steps.

    Attributes:
        inner_steps: K.
        steps: outer steps asked for.
        probes: those that ran.
        failure: the error that ended them; of order 0 if the callable refuses the model's shapes.
        expanded: the callable was given as many queries as keys, of which the last one was read.
    """

    inner_steps: int
    steps: int
    probes: tuple[StepProbe, ...] = ()
    failure: Failure | None = None
    expanded: bool = False

    def mean(self, of: Callable[[StepProbe], float]) -> float:
        """Mean of a number over the steps; NaN if none ran."""
        return statistics.fmean(map(of, self.probes)) if self.probes else math.nan

    @property
    def rel_diff_mean(self) -> float:
        """Mean over the steps of |g_FULL - g_FO| / |g_FULL|."""
        return self.mean(lambda probe: probe.rel_diff)


def probe_learning(
    attention: Attention,
    *,
    inner_steps: int,
    steps: int,
    convention: Convention | None = None,
    task: MetaTask | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DepthProbe:
    """Meta-train the sequence classifier over a callable for a few steps, with the reference beside it.

    At every outer step: FO, then FULL meta-gradient, then the second-order paths, each also through the
    explicit softmax in float64 at the same parameters and tasks; then one step of Adam with the reference's
    FULL meta-gradient, so that every implementation is measured along one path. The first error ends it.
    Random numbers come from ``seed`` alone, and the registry of attention backends and the global generator
    are left as they were.

    Args:
        attention: in the convention of the probes, see `Convention.bind`; needs no vmap rule.
        inner_steps: K.
        steps: outer steps.
        convention: whether it always masks, and where the diagonal starts.
        task: the meta-learning problem.
        device, dtype: of parameters and data; the outer optimiser's copy is float32.
        seed: of parameters, tasks and directions.
    """
    convention, task = convention or Convention(), task or MetaTask()
    master = _classifier(task.spec, seed).to(device)
    form = _form(attention, convention, task, device, dtype)
    if isinstance(form, Failure):
        return DepthProbe(inner_steps, steps, failure=form)
    attend, expanded = form
    adam = torch.optim.Adam(master.parameters(), lr=task.outer_lr)
    probes: list[StepProbe] = []
    with registered_backend(_BACKEND, as_backend(attend), replace=True):
        for step in range(steps):
            ids = torch.arange(task.tasks * step, task.tasks * (step + 1), device=device)
            batch = sample_tasks(task.spec, ids, seed=seed, epoch=0, stream="train", dtype=dtype)
            model = _over(master, _BACKEND, dtype)
            found = _step(model, batch[:2], batch[2:4], inner_steps, task.inner_lr, seed + step)
            if isinstance(found, Failure):
                return DepthProbe(inner_steps, steps, tuple(probes), found, expanded)
            probe, reference_gradient = found
            probes.append(probe)
            for name, parameter in master.named_parameters():
                parameter.grad = reference_gradient[name].float()
            adam.step()
    return DepthProbe(inner_steps, steps, tuple(probes), expanded=expanded)


def _step(
    model: SeqClassifier, support: Batch, query: Batch, inner_steps: int, inner_lr: float, seed: int
) -> tuple[StepProbe, dict[str, Tensor]] | Failure:
    """One step's probe and the reference's FULL meta-gradient, or what raised."""

    def gradient(of: SeqClassifier, mode: MetaMode) -> dict[str, Tensor]:
        sets = [(x.to(of.head.weight.dtype), y) for x, y in (support, query)]
        return meta_gradient(of, *sets, mode=mode, inner_steps=inner_steps, inner_lr=inner_lr).grads

    reference = reference_twin(model)
    order = 1
    try:
        first = gradient(model, MetaMode.FO)
        order = 2
        full = gradient(model, MetaMode.FULL)
        paths = {
            suffix: second_order_path(model, reference, support, modules=modules, seed=seed)
            for suffix, modules in PATHS.items()
        }
    except Exception as error:  # the implementation is someone else's and may raise anything
        return Failure.of(error, order)
    expected_first, expected_full = gradient(reference, MetaMode.FO), gradient(reference, MetaMode.FULL)
    probe = StepProbe(
        rel_diff=relative_difference(first, full),
        reference_rel_diff=relative_difference(expected_first, expected_full),
        full_error=relative_difference(full, expected_full),
        first_order_error=relative_difference(first, expected_first),
        paths=paths,
    )
    return probe, expected_full


def _form(
    attention: Attention,
    convention: Convention,
    task: MetaTask,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[Attention, bool] | Failure:
    """The callable with the classifier's one query or, if it refuses that, with one a key."""
    one = torch.zeros(task.tasks, task.spec.support_size, 1, task.spec.width, device=device, dtype=dtype)
    many = one.expand(-1, -1, task.spec.length, -1).contiguous()
    sees_all = not convention.always_causal or convention.alignment == "lower_right"
    failure = None
    for expanded in (False, True) if sees_all else (True,):
        form = _as_called(attention, convention.always_causal, expanded)
        try:
            with torch.no_grad():
                out = form(one, many, many)
            if out.dtype is not dtype:
                raise TypeError(f"the output is of {out.dtype} instead of {dtype}")
        except Exception as error:  # the implementation is someone else's and may raise anything
            failure = failure or Failure.of(error, 0)
        else:
            return form, expanded
    assert failure is not None
    return failure


def _as_called(attention: Attention, always_causal: bool, expanded: bool) -> Attention:
    """Adapt a callable to the classifier, whose calls have no mask.

    Expanded, the query is repeated to the number of keys and the last row is read, which sees every key
    under a causal mask too.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        if not expanded:
            return attention(query, key, value, is_causal=always_causal)
        repeated = query.expand(*key.shape[:-1], query.shape[-1])
        return attention(repeated, key, value, is_causal=always_causal)[..., -1:, :]

    return attend


def _classifier(spec: SeqClsSpec, seed: int) -> SeqClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SeqClassifier(spec.width, spec.num_classes, backend="reference")


def _over(model: SeqClassifier, backend: str, dtype: torch.dtype) -> SeqClassifier:
    """A copy of a classifier over another backend, in another dtype."""
    twin = copy.deepcopy(model).to(dtype)
    twin.backend = backend
    return twin
