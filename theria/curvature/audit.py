"""The audit: every probe of one attention callable, and the verdict they add up to."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from theria.curvature.accuracy import Deviation
from theria.curvature.cases import Case, default_cases
from theria.curvature.convention import Convention, Layout, find_convention
from theria.curvature.derivatives import OUTPUTS, Failure
from theria.curvature.learning import DepthProbe, MetaTask, StepProbe, probe_learning
from theria.curvature.probes import DerivativeProbe, probe_derivatives
from theria.curvature.verdicts import SURVIVING, TOLERANCES, Status, Verdict

_WRONG = {
    Verdict.WRONG_FORWARD: ("forward",),
    Verdict.WRONG_GRADIENT: ("vjp", "jvp"),
    Verdict.WRONG_CURVATURE: ("hvp", "forward_over_reverse"),
}
_META_GRADIENTS: dict[Verdict, tuple[str, Callable[[StepProbe], float]]] = {
    Verdict.WRONG_GRADIENT: ("FO", attrgetter("first_order_error")),
    Verdict.WRONG_CURVATURE: ("FULL", attrgetter("full_error")),
}
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in words, and the verdict it alone would give."""

    verdict: Verdict
    text: str


@dataclass(frozen=True)
class AuditReport:
    """Everything an audit has seen.

    Attributes:
        name: of the implementation.
        wrapper: what was put around it; "baseline" for nothing.
        device, dtype: where and in what it ran.
        convention: how it was called.
        cases: its derivatives, case by case.
        depths: MAML through it, one for each number of inner steps.
        findings: what is wrong, worst first; empty for SAFE.
    """

    name: str
    wrapper: str
    device: str
    dtype: torch.dtype
    convention: Convention
    cases: tuple[DerivativeProbe, ...]
    depths: tuple[DepthProbe, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """That of the first finding; SAFE if there is none."""
        return self.findings[0].verdict if self.findings else Verdict.SAFE

    @property
    def failure(self) -> Failure | None:
        """The first error among those of the lowest order; refused cases only if all were refused."""
        return _first_failure(self.cases, self.depths)

    @property
    def status(self) -> Status:
        """Whether differentiation ran."""
        return Status.OK if self.failure is None else self.failure.status

    @property
    def surviving(self) -> dict[str, float]:
        """Input -> the least share of its curvature that is there, over all cases."""
        return surviving_shares(self.cases)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Inputs that keep less than 10% of their curvature, in a case or in the classifier."""
        return collapsed_inputs(self.cases, self.depths)

    @property
    def attn_second_order_ok(self) -> bool:
        """Second order straight through query, key and value runs and keeps every input's curvature."""
        ran = [case for case in self.cases if not case.refused]
        return (
            bool(ran)
            and all(case.failure is None for case in ran)
            and all(share >= SURVIVING for share in self.surviving.values())
        )

    def worst(self, kind: str) -> Deviation | None:
        """The worst deviation over the cases of a kind of quantity; None if it was never measured."""
        found = [d for case in self.cases if (d := case.worst(kind)) is not None]
        return max(found, key=lambda deviation: deviation.of_allowed, default=None)


def audit(
    attention_fn: Callable[..., Any],
    *,
    name: str | None = None,
    wrapper: str = "baseline",
    layout: Layout | None = None,
    convention: Convention | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    inner_steps: Sequence[int] = (1, 5),
    steps: int = 5,
    cases: Sequence[Case] | None = None,
    task: MetaTask | None = None,
    seed: int = 0,
) -> AuditReport:
    """Tell whether second-order learning through an attention callable is real.

    Everything is measured on the callable itself, against the explicit softmax in float64: its output, its
    first and second derivatives in reverse and in forward mode, and MAML on the sequence classifier through
    it. It needs no vmap rule, and forward mode that it does not offer is reported as such. The registry of
    attention backends and the random generators are left as they were.

    Args:
        attention_fn: takes query, key and value, of (batch, heads, length, dim) or (batch, length, heads,
            dim), and perhaps ``is_causal`` or ``causal`` and a scale; see `find_convention`.
        name: in the report; by default the callable's own.
        wrapper: in the report, what was put around the implementation.
        layout: the order of the dimensions, where outputs and names do not tell it.
        convention: the whole calling convention, which is then not looked for.
        device, dtype: what it is called with.
        inner_steps: depths of the inner loop that are probed; empty for the derivatives alone.
        steps: outer steps at each depth.
        cases: attention calls whose derivatives are probed; by default `default_cases`.
        task: the meta-learning problem.
        seed: of all random numbers.

    Raises:
        ConventionError: if it cannot be told how the callable is to be called.
        ValueError: if there is nothing to probe: no case that its masks allow, and no ``inner_steps``.
    """
    with torch.inference_mode(mode=False), torch.enable_grad(), _one_thread():
        if convention is None:
            convention = find_convention(attention_fn, layout=layout, device=device, dtype=dtype)
        attention = convention.bind(attention_fn)
        derivatives = tuple(
            probe_derivatives(attention, case, convention=convention, device=device, dtype=dtype, seed=seed)
            for case in (default_cases(device) if cases is None else cases)
            if convention.can_mask(case.causal)
        )
        depths = tuple(
            probe_learning(
                attention,
                inner_steps=count,
                steps=steps,
                convention=convention,
                task=task,
                device=device,
                dtype=dtype,
                seed=seed,
            )
            for count in inner_steps
        )
    if not derivatives and not depths:
        raise ValueError(
            "nothing to probe: no case that the callable's masks allow, and inner_steps is empty"
        )
    return AuditReport(
        name=name or _name_of(attention_fn),
        wrapper=wrapper,
        device=str(device),
        dtype=dtype,
        convention=convention,
        cases=derivatives,
        depths=depths,
        findings=tuple(_findings(derivatives, depths, dtype)),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors are small: on a CPU that others use too, a second thread can cost ten times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def surviving_shares(cases: Sequence[DerivativeProbe]) -> dict[str, float]:
    """Input -> the least share of its curvature over the cases in which it has some."""
    return {
        name: min(shares)
        for name in OUTPUTS
        if (shares := [case.surviving[name] for case in cases if name in case.surviving])
    }


def collapsed_inputs(cases: Sequence[DerivativeProbe], depths: Sequence[DepthProbe]) -> tuple[str, ...]:
    """Inputs below a tenth of their curvature in some case, or whose projection is so in the classifier."""
    gone = {name for name, share in surviving_shares(cases).items() if share < SURVIVING}
    gone |= {
        _PROJECTIONS[module] for module, share in _surviving_projections(depths).items() if share < SURVIVING
    }
    return tuple(name for name in OUTPUTS if name in gone)


def _surviving_projections(depths: Sequence[DepthProbe]) -> dict[str, float]:
    """Projection of the classifier -> the least share of its curvature over all steps."""
    probes = [probe for depth in depths for probe in depth.probes]
    return {
        module: min(probe.paths["attn"].surviving[module] for probe in probes)
        for module in _PROJECTIONS
        if probes
    }


def _findings(
    cases: Sequence[DerivativeProbe], depths: Sequence[DepthProbe], dtype: torch.dtype
) -> Iterator[Finding]:
    """What is wrong, in the order of the taxonomy."""
    failure = _first_failure(cases, depths)
    if failure is not None:
        verdict = Verdict.FIRST_ORDER_ONLY if failure.order == 2 else Verdict.HARD_FAIL
        yield Finding(verdict, failure.error)
    kept = {**surviving_shares(cases), **_surviving_projections(depths)}
    gone = [f"{name} keeps {share:.1%}" for name, share in kept.items() if share < SURVIVING]
    if gone:
        yield Finding(Verdict.SILENT_COLLAPSE, f"second order runs without its curvature: {', '.join(gone)}")
    for verdict, kinds in _WRONG.items():
        for kind in kinds:
            yield from _beyond_tolerance(verdict, kind, cases)
        yield from _wrong_meta_gradient(verdict, depths, dtype)


def _beyond_tolerance(verdict: Verdict, kind: str, cases: Sequence[DerivativeProbe]) -> Iterator[Finding]:
    """The quantity and the case in which an error exceeds what is allowed the most."""
    found = [
        (deviation, quantity, case)
        for case in cases
        for quantity, deviation in case.deviations.items()
        if quantity.kind == kind
    ]
    if not found:
        return
    worst, quantity, case = max(found, key=lambda entry: entry[0].of_allowed)
    if worst.of_allowed <= 1:
        return
    if case.failure is not None and case.failure.order == 0:
        yield Finding(verdict, f"{case.failure.error} ({case.case})")
        return
    yield Finding(
        verdict,
        f"{quantity} off by {worst.relative:.2g}, {worst.of_allowed:.2g} times what is allowed ({case.case})",
    )


def _wrong_meta_gradient(
    verdict: Verdict, depths: Sequence[DepthProbe], dtype: torch.dtype
) -> Iterator[Finding]:
    """A meta-gradient off by more than the tolerance, for dtypes in which one number is one."""
    if verdict not in _META_GRADIENTS or dtype not in TOLERANCES:
        return
    mode, error_of = _META_GRADIENTS[verdict]
    for depth in depths:
        for error in map(error_of, depth.probes):
            if not error <= TOLERANCES[dtype]:
                after = f"after {depth.inner_steps} inner steps"
                yield Finding(verdict, f"{mode} meta-gradient off by {error:.2g} {after}")
                return


def _first_failure(cases: Sequence[DerivativeProbe], depths: Sequence[DepthProbe]) -> Failure | None:
    """The failure of the lowest order; a refused call is one only where every case was refused."""
    raised = [*(case.failure for case in cases), *(depth.failure for depth in depths)]
    all_refused = all(case.refused for case in cases)
    failures = [failure for failure in raised if failure is not None and (failure.order > 0 or all_refused)]
    return min(failures, key=lambda failure: failure.order, default=None)


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", None) or type(function).__name__
