"""An audit's report as people and programs read it: rows for CSV, JSON, a table on the terminal, Markdown."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from theria.curvature.audit import AuditReport
from theria.curvature.derivatives import INPUTS, KINDS, OUTPUTS
from theria.curvature.learning import PATHS, DepthProbe, StepProbe
from theria.curvature.probes import SecondOrderPath

Row = dict[str, str | float | int | bool | None]

_IN_DETAIL = 2
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def rows(report: AuditReport) -> list[Row]:
    """One row for each number of inner steps, or one where none was asked for.

    The columns up to ``error`` are those of the published taxonomy. What was not measured is None.
    """
    return [_row(report, depth) for depth in (report.depths or (None,))]


def write_csv(table: Sequence[Row], path: Path) -> None:
    """Rows with a header, None as an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def write_json(reports: Sequence[AuditReport], path: Path) -> None:
    """Everything, case by case; numbers that are not finite as text."""
    content = json.dumps([as_dict(report) for report in reports], indent=1, allow_nan=False)
    path.write_text(content + "\n", encoding="utf-8")


def as_dict(report: AuditReport) -> dict[str, Any]:
    """A report in lists, dictionaries, text and finite numbers."""
    cases = [
        {
            "case": str(probe.case),
            "failure": probe.failure,
            "unsupported": probe.unsupported,
            "deviations": {str(q): deviation._asdict() for q, deviation in probe.deviations.items()},
            "shares": {str(q): share for q, share in probe.shares.items()},
            "surviving": probe.surviving,
        }
        for probe in report.cases
    ]
    content = {
        "name": report.name,
        "wrapper": report.wrapper,
        "device": report.device,
        "dtype": report.dtype,
        "verdict": report.verdict,
        "status": report.status,
        "collapsed": report.collapsed,
        "findings": report.findings,
        "convention": report.convention,
        "rows": rows(report),
        "cases": cases,
        "depths": report.depths,
    }
    return {name: _plain(value) for name, value in content.items()}


HEADER = (
    "implementation",
    "dtype",
    "verdict",
    "forward",
    "vjp",
    "jvp",
    "hvp",
    "kept q / k / v",
    "path all / attn / head",
    "rel_diff",
)
"""Columns of `summary`."""


def summary(report: AuditReport) -> list[str]:
    """One line of a table: the errors as multiples of what is allowed, and what survives."""
    kept = report.surviving
    paths = [
        _ratio(report.depths[0].mean(_magnitude(suffix)) if report.depths else math.nan) for suffix in PATHS
    ]
    differences = [
        f"{depth.inner_steps}: {depth.rel_diff_mean:.3f}" for depth in report.depths if depth.probes
    ]
    return [
        report.name if report.wrapper == "baseline" else f"{report.wrapper} / {report.name}",
        _dtype(report),
        report.verdict.value,
        *(_error(report, kind) for kind in ("forward", "vjp", "jvp", "hvp")),
        " / ".join(_ratio(kept.get(name, math.nan)) for name in INPUTS) if kept else "",
        " / ".join(paths) if any(paths) else "",
        ", ".join(differences),
    ]


def remarks(report: AuditReport) -> list[str]:
    """What a table has no room for: findings, forward modes that are missing, calls that were refused."""
    lines = [f"{finding.verdict.value}: {finding.text}" for finding in report.findings]
    missing: dict[str, str] = {}
    for probe in report.cases:
        missing |= probe.unsupported
    lines += [f"not offered, {way}: {error}" for way, error in missing.items()]
    refused = [probe for probe in report.cases if probe.refused]
    if refused and len(refused) < len(report.cases):
        lines.append(
            f"{len(refused)} of {len(report.cases)} calls refused, the first ({refused[0].case}):"
            f" {refused[0].refused}"
        )
    if report.cases and not any(probe.case.causal for probe in report.cases):
        lines.append("not asked under a causal mask: there is no argument is_causal or causal")
    for depth in report.depths:
        if depth.failure is not None and depth.failure.order == 0 and not report.findings:
            lines.append(f"the sequence classifier cannot call it: {depth.failure.error}")
            break
    if any(depth.expanded for depth in report.depths):
        lines.append("takes one query a key: the classifier's query was repeated and the last row read")
    return lines


def tables(reports: Sequence[AuditReport]) -> list[Table]:
    """For a terminal: everything about one or two implementations, or a line for each of more."""
    if len(reports) <= _IN_DETAIL:
        return [_detail(report) for report in reports]
    found = Table(title="curvature of attention; errors as multiples of what is allowed")
    for column in HEADER[:8]:
        found.add_column(column, overflow="fold")
    for report in reports:
        found.add_row(*summary(report)[:8])
    return [found]


def _detail(report: AuditReport) -> Table:
    """One implementation, a line for each diagnostic."""
    found = Table(title=f"{report.name}, {_dtype(report)} on {report.device}: {report.verdict.value}")
    for column in ("diagnostic", "found", "sound"):
        found.add_column(column, overflow="fold")
    found.add_row("status", report.status.value, "OK")
    for kind in KINDS:
        worst = report.worst(kind)
        text = "not measured" if worst is None else f"{worst.relative:.1e}, {worst.of_allowed:.2g} x allowed"
        found.add_row(f"{kind.replace('_', ' ')} error", text, "at most 1 x allowed")
    for name in OUTPUTS:
        kept = report.surviving.get(name)
        found.add_row(f"curvature kept, {name}", "not measured" if kept is None else f"{kept:.1%}", "100%")
    for depth in report.depths:
        steps = f"k={depth.inner_steps}"
        if not depth.probes:
            found.add_row(f"MAML, {steps}", "did not run", "runs")
            continue
        for suffix, title in (("", "all"), ("attn", "attention"), ("head", "head")):
            found.add_row(f"path, {title}, {steps}", f"{depth.mean(_magnitude(suffix)):.1%}", "100%")
        reference = depth.mean(lambda probe: probe.reference_rel_diff)
        found.add_row(f"rel_diff FULL-FO, {steps}", f"{depth.rel_diff_mean:.3f}", f"{reference:.3f}")
        wrong = depth.mean(lambda probe: probe.full_error)
        found.add_row(f"meta-gradient error, {steps}", f"{wrong:.1e}", "rounding")
    return found


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in lines)
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *escaped)]


def _row(report: AuditReport, depth: DepthProbe | None) -> Row:
    failure, refusal = report.failure, ""
    if depth is not None and depth.failure is not None:
        if depth.failure.order > 0:
            failure = depth.failure
        else:
            refusal = depth.failure.error
    row: Row = {
        "wrapper": report.wrapper,
        "attention_backend": report.name,
        "status": (failure.status if failure else report.status).value,
    }
    for suffix in PATHS:
        there = [probe.paths[suffix].exists for probe in depth.probes] if depth else []
        name = f"second_order_path_{suffix}".rstrip("_")
        measured = bool(there) or failure is not None
        row[f"{name}_all"] = bool(there) and all(there) if measured else None
        row[f"{name}_any"] = any(there) if measured else None
    row["attn_second_order_ok"] = report.attn_second_order_ok
    row["rel_diff_mean"] = _measured(depth.rel_diff_mean if depth else math.nan)
    row["error"] = failure.error if failure else refusal or None
    row["inner_steps"] = depth.inner_steps if depth else None
    row["steps"] = depth.steps if depth else None
    for kind in KINDS:
        worst = report.worst(kind)
        row[f"{kind}_rel_error"] = None if worst is None else worst.relative
        row[f"{kind}_of_allowed"] = None if worst is None else worst.of_allowed
    for kind, names in (("jvp", INPUTS), ("hvp", OUTPUTS)):
        for name in names:
            row[f"{kind}_rel_error_{name}"] = _largest(report, kind, name)
    for name in OUTPUTS:
        row[f"surviving_{name}"] = report.surviving.get(name)
    row["verdict"] = report.verdict.value
    row["collapsed"] = " ".join(report.collapsed)
    row |= _learned(depth)
    row["device"], row["dtype"] = report.device, _dtype(report)
    return row


def _learned(depth: DepthProbe | None) -> Row:
    """What MAML showed beyond the published columns, as means over the steps."""

    def mean(of: Callable[[StepProbe], float]) -> float | None:
        return _measured(depth.mean(of)) if depth else None

    row: Row = {}
    for suffix in PATHS:
        row[f"second_order_magnitude_{suffix}".rstrip("_")] = mean(_magnitude(suffix))
    row["surviving_attn"] = mean(lambda probe: probe.paths["attn"].kept)
    for module in _PROJECTIONS:
        row[f"surviving_{module}"] = mean(_surviving(module))
    row["reference_rel_diff"] = mean(lambda probe: probe.reference_rel_diff)
    row["first_order_meta_gradient_rel_error"] = mean(lambda probe: probe.first_order_error)
    row["meta_gradient_rel_error"] = mean(lambda probe: probe.full_error)
    return row


def _dtype(report: AuditReport) -> str:
    return str(report.dtype).removeprefix("torch.")


def _magnitude(suffix: str) -> Callable[[StepProbe], float]:
    return lambda probe: probe.paths[suffix].magnitude


def _surviving(module: str) -> Callable[[StepProbe], float]:
    return lambda probe: probe.paths["attn"].surviving[module]


def _largest(report: AuditReport, kind: str, name: str) -> float | None:
    """The largest error of a kind of quantity that belongs to one input."""
    found = [
        deviation.relative
        for probe in report.cases
        for quantity, deviation in probe.deviations.items()
        if quantity.kind == kind and quantity.of == name
    ]
    return max(found, default=None)


def _measured(value: float) -> float | None:
    return None if math.isnan(value) else value


def _error(report: AuditReport, kind: str) -> str:
    worst = report.worst(kind)
    return "" if worst is None else f"{worst.of_allowed:.2g}"


def _ratio(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _plain(value: Any) -> Any:
    """A value in what JSON knows."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, SecondOrderPath):
        return _plain({**asdict(value), "exists": value.exists})
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return str(value)
