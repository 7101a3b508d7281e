"""Everything that is made of finished runs: combined and summary CSVs, pictures, the page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import markdown_table
from experiments.operator_sensitivity.ledger import Ledger, write_csv
from experiments.operator_sensitivity.plots import draw_all
from experiments.operator_sensitivity.runs import CELL
from experiments.operator_sensitivity.statistics import cells, gains
from experiments.operator_sensitivity.strictness import StrictAgreement, strict_agreement
from experiments.operator_sensitivity.summary import INTRODUCTION, section
from lightning_modules.atomic_file import atomic_file

PREFIX = "operator_sensitivity"


def combine(ledger: Ledger, directory: Path) -> tuple[list[str], StrictAgreement]:
    """Write the CSVs and pictures of one tag; the lines of its section, and whether FO is FO_STRICT.

    Files are ``operator_sensitivity_<tag>_all.csv`` with every run, ``_summary.csv`` with means, intervals
    and paired gains by configuration, ``_risk_checks.csv`` where the checks were made, and the pictures.
    """
    table = write_tables(ledger, directory)
    strict = strict_agreement(table, ledger)
    pictures = draw_all(table, ledger, directory, f"{PREFIX}_{ledger.tag}")
    return [*section(table, strict, ledger.tag, pictures), *_risk_checks(ledger, directory)], strict


def risk_checks_csv(directory: Path, tag: str) -> Path:
    """Where the figures of the risk checks of a tag stand."""
    return directory / f"{PREFIX}_{tag}_risk_checks.csv"


def _risk_checks(ledger: Ledger, directory: Path) -> list[str]:
    """The checks that were made under the tag, their CSV put beside the page's others; nothing without."""
    source = risk_checks_csv(ledger.directory, ledger.tag)
    if not source.exists():
        return []
    checks = pd.read_csv(source, keep_default_na=False)
    write_csv(checks, risk_checks_csv(directory, ledger.tag))
    return [
        "### Risk checks",
        "",
        f"Command: `python -m experiments.operator_sensitivity risk --tag {ledger.tag}`, on the same device.",
        "",
        *risk_checks_table(checks.to_dict("records")),
        "",
    ]


def risk_checks_table(checks: Iterable[Mapping[Any, Any]]) -> list[str]:
    """Markdown of the rows of the risk checks' CSV."""
    lines = [
        [row["verdict"], row["name"], f"{row['figure']:.3g}", f"{row['limit']:g}", row["note"]]
        for row in checks
    ]
    return markdown_table(["verdict", "check", "figure", "limit", "conditions"], lines)


def write_tables(ledger: Ledger, directory: Path) -> pd.DataFrame:
    """Write the combined and the summary CSV of a tag; the combined table."""
    directory.mkdir(parents=True, exist_ok=True)
    table = ledger.read()
    prefix = f"{PREFIX}_{ledger.tag}"
    write_csv(table, directory / f"{prefix}_all.csv")
    write_csv(summary_table(table), directory / f"{prefix}_summary.csv")
    return table


def summary_table(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of every configuration and mode, with the paired gain over FO beside them."""
    means = cells(table)
    if means.empty:
        return means
    modes = [mode for mode in dict.fromkeys(means["mode"]) if mode != "FO"]
    parts = [gains(table, mode, "FO").assign(mode=mode) for mode in modes]
    compared = pd.concat(parts) if parts else pd.DataFrame(columns=[*CELL, "mode"])
    return means.merge(compared, on=[*CELL, "mode"], how="left")


def write_page(sections: Sequence[list[str]], path: Path, heading: Sequence[str] = ()) -> None:
    """The page of one or several studies."""
    lines = ["# Operator sensitivity: from second-order signal to learning", "", *heading, *INTRODUCTION]
    lines += [line for part in sections for line in part]
    with atomic_file(path) as file:
        file.write(("\n".join(lines).rstrip() + "\n").encode())
