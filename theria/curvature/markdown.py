"""The safety table of real implementations as a Markdown file with a section for each device and dtype."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from theria.curvature.audit import AuditReport
from theria.curvature.known import versions
from theria.curvature.report import HEADER, markdown_table, remarks, summary

_INTRODUCTION = """# Which attention implementations carry second order

Each row is `theria.curvature.audit` of one implementation: its output and its first and second derivatives
against the explicit softmax in float64 (errors as multiples of what the dtype is allowed: above 1 is wrong),
the least share of the curvature that each input keeps, the magnitude of the second-order path of the sequence
classifier through all parameters, through the attention's and through the head's, and |FULL - FO| / |FULL| by
the number of inner steps. An empty cell was not reached, because an earlier order raised.
"""


def write_markdown(reports: Sequence[AuditReport], absent: Mapping[str, str], path: Path) -> None:
    """Write or renew the sections of the devices and dtypes at hand; other sections stay as they are."""
    sections = _sections(path.read_text(encoding="utf-8")) if path.exists() else {"": _INTRODUCTION}
    kinds = dict.fromkeys(_title(report) for report in reports)
    for title in kinds:
        mine = [report for report in reports if _title(report) == title]
        dtype = title.rpartition(", ")[2]
        missing = {
            name.rpartition(", ")[0]: reason for name, reason in absent.items() if name.endswith(f", {dtype}")
        }
        sections[title] = "\n".join(_section(mine, missing))
    text = [
        f"## {title}\n\n{body.strip()}\n" if title else f"{body.strip()}\n"
        for title, body in sections.items()
    ]
    path.write_text("\n".join(text), encoding="utf-8")


def _section(reports: Sequence[AuditReport], absent: Mapping[str, str]) -> list[str]:
    interpreted = [f"TRITON_INTERPRET={value}"] if (value := os.environ.get("TRITON_INTERPRET")) else []
    command = shlex.join([*interpreted, "python", "-m", "theria.curvature", *sys.argv[1:]])
    lines = [
        f"Command: `{command}`  ",
        f"Versions: {versions()}, Python {platform.python_version()}",
        "",
        *markdown_table(HEADER, [summary(report) for report in reports]),
        "",
    ]
    for report in reports:
        lines += [f"- {report.name}: {remark}" for remark in remarks(report)]
    lines += [f"- {name}: absent, {reason}" for name, reason in absent.items()]
    return lines


def _title(report: AuditReport) -> str:
    return f"{_device_name(report.device)}, {str(report.dtype).removeprefix('torch.')}"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def _sections(text: str) -> dict[str, str]:
    """Heading -> body of every second-level section; what stands before them under the empty heading."""
    found: dict[str, list[str]] = {"": []}
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
            found[title] = []
        else:
            found[title].append(line)
    return {heading: "\n".join(body) for heading, body in found.items()}
