"""Probes of an attention callable: its derivatives against float64, and its second-order paths in a model.

What autograd answers is never taken for a fact: a second-order path exists where its magnitude does, compared
with the explicit softmax in float64 on the same numbers.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theria.curvature.accuracy import Deviation, compare, share
from theria.curvature.cases import Case, draw
from theria.curvature.convention import Attention, Convention
from theria.curvature.derivatives import (
    OUTPUTS,
    Failure,
    Quantity,
    differentiate_again,
    evaluate,
)
from theria.curvature.verdicts import PRESENT
from theria.maml import TaskModel
from theria.maml.task_model import Batch


@dataclass(frozen=True)
class DerivativeProbe:
    """What an implementation does in one case, beside the explicit softmax in float64.

    Attributes:
        case: the call.
        deviations: quantity -> its error.
        shares: Hessian-vector product -> <H u, H_ref u> / |H_ref u|^2, with u in one of query, key and value,
            where the reference is well above rounding. The output's cotangent is a gradient's fourth input.
        failure: the first error on the way to the second derivative.
        unsupported: forward modes that the implementation does not offer -> the error.
    """

    case: Case
    deviations: dict[Quantity, Deviation] = field(default_factory=dict)
    shares: dict[Quantity, float] = field(default_factory=dict)
    failure: Failure | None = None
    unsupported: dict[str, str] = field(default_factory=dict)

    @property
    def refused(self) -> str:
        """Why the implementation does not do this call at all, or nothing."""
        return self.failure.error if self.failure and self.failure.order == 0 and not self.deviations else ""

    @property
    def surviving(self) -> dict[str, float]:
        """Input -> the share of its curvature that is there, the least over the ways.

        A Hessian-vector product H u has blocks: of one input, with u along another. An input's share is the
        mean over the blocks of it, or over those along it, whichever is less: it may be lost as a variable of
        other gradients, or its own gradient may come without a graph. Each block counts alike, so that an
        input is not held responsible for what is missing of its product with another one, however large that
        product is in this case; where that product is all that can be measured of it, it says nothing.
        """
        blocks: dict[tuple[str, str, str], dict[str, float]] = {}
        for quantity, kept in self.shares.items():
            for side, name, other in (
                ("of", quantity.of, quantity.along),
                ("along", quantity.along, quantity.of),
            ):
                blocks.setdefault((quantity.way, side, name), {})[other] = kept
        found: dict[str, list[float]] = {}
        for (_, _, name), shares in blocks.items():
            if len(shares) > 1 or name in shares:
                found.setdefault(name, []).append(statistics.fmean(shares.values()))
        return {name: min(found[name]) for name in OUTPUTS if name in found}

    def worst(self, kind: str) -> Deviation | None:
        """The deviation furthest beyond what is allowed, among the quantities of a kind (see `KINDS`)."""
        found = [deviation for q, deviation in self.deviations.items() if q.kind == kind]
        return max(found, key=lambda deviation: deviation.of_allowed, default=None)


def probe_derivatives(
    attention: Attention,
    case: Case,
    *,
    convention: Convention | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DerivativeProbe:
    """Compare forward, vjp, jvp and Hessian-vector products of a callable with float64.

    Everything is asked of the callable itself, see `theria.curvature.derivatives.evaluate`; what is allowed
    stands in `theria.curvature.accuracy.compare`.

    Args:
        attention: in the convention of the probes, see `Convention.bind`.
        case: the call.
        convention: in which layout memory is contiguous, and where the causal diagonal starts.
        device, dtype: of the inputs.
        seed: of the inputs and the direction.
    """
    convention = convention or Convention()
    sample = draw(case, layout=convention.layout, device=device, dtype=dtype, seed=seed)
    found = evaluate(attention, sample, causal=case.causal)
    deviations, shares = compare(
        found.values, sample, causal=case.causal, alignment=convention.alignment, dtype=dtype
    )
    return DerivativeProbe(case, deviations, shares, found.failure, found.unsupported)


@dataclass(frozen=True)
class SecondOrderPath:
    """Curvature of the support loss by a set of parameters, H u for a random u in their space.

    Attributes:
        magnitude: |H u| relative to the reference's.
        kept: <H u, H_ref u> / |H_ref u|^2 over all of the parameters.
        surviving: module -> <H u, H_ref u> / |H_ref u|^2 over its parameters, the mean over directions u in
            each of the modules alone.
    """

    magnitude: float
    kept: float
    surviving: dict[str, float]

    @property
    def exists(self) -> bool:
        """By magnitude, not by whether autograd returned something."""
        return self.magnitude >= PRESENT


def second_order_path(
    model: nn.Module,
    reference: nn.Module,
    support: Batch,
    *,
    modules: Sequence[str],
    seed: int = 0,
) -> SecondOrderPath:
    """How much of the second-order signal through some modules of a model is there.

    The inner gradient by these modules' parameters is differentiated by the same parameters, at the model's
    own values, one copy a task.

    Args:
        model: over the attention under test; maps x (batch, length, width) to logits.
        reference: the same model in float64 over the explicit softmax.
        support: x (tasks, batch, length, width), y (tasks, batch).
        modules: names of the modules that hold the parameters.
        seed: of the direction.

    Raises:
        RuntimeError: what autograd raises where the attention cannot be differentiated twice.
    """
    found = _curvature(model, support, modules, seed)
    expected = _curvature(reference, (support[0].double(), support[1]), modules, seed)
    shares: dict[str, list[float]] = {module: [] for module in modules}
    for along, of in expected:
        if expected[along, of].any():
            shares[of].append(share(found[along, of], expected[along, of]))
    whole, right = _summed(found, modules), _summed(expected, modules)
    return SecondOrderPath(
        magnitude=(whole.norm() / right.norm()).item(),
        kept=share(whole, right),
        surviving={module: statistics.fmean(shares[module]) for module in modules if shares[module]},
    )


def relative_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """|x - y| / |y| over all parameters together, in float64; 0 where nothing differs.

    Of FO by FULL meta-gradients it is the part of a meta-gradient that second order makes.
    """
    difference = _norm({name: found[name].double() - value.double() for name, value in expected.items()})
    return 0.0 if difference == 0 else (difference / _norm(expected)).item()


def _curvature(
    model: nn.Module, support: Batch, modules: Sequence[str], seed: int
) -> dict[tuple[str, str], Float[Tensor, " parameters"]]:
    """(module that u is in, module) -> H u by the second's parameters; all other parameters are constants."""
    task_model = TaskModel(model)
    stacked, _ = task_model.initial(support[1].shape[0])
    owner = {i: name.rpartition(".")[0] for i, name in enumerate(task_model.adapted_names)}
    own = {i: stacked[i].requires_grad_() for i, module in owner.items() if module in modules}
    loss, _ = task_model.total_loss(stacked, [], support)
    gradients = torch.autograd.grad(loss, tuple(own.values()), create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    products: dict[str, list[Tensor]] = {}
    for (i, parameter), gradient in zip(own.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator).to(parameter)
        products.setdefault(owner[i], []).append((gradient * direction).sum())
    curvature: dict[tuple[str, str], Tensor] = {}
    for along, scalars in products.items():
        curved = differentiate_again(torch.stack(scalars).sum(), tuple(own.values()), retain_graph=True)
        for module in products:
            parts = [h.double().flatten() for i, h in zip(own, curved, strict=True) if owner[i] == module]
            curvature[along, module] = torch.cat(parts)
    return curvature


def _summed(
    curvature: Mapping[tuple[str, str], Tensor], modules: Sequence[str]
) -> Float[Tensor, " parameters"]:
    """H u for u in all of the modules: the sum over the directions, module after module."""
    return torch.cat([torch.stack([curvature[along, of] for along in modules]).sum(0) for of in modules])


def _norm(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(v.double()) for v in values.values()]).norm()
