"""The safety table of real implementations as a Markdown file with a section for each device and dtype."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from theria.curvature.audit import AuditReport
from theria.curvature.known import versions
from theria.curvature.report import HEADER, markdown_table, remarks, summary
from theria.provenance import device_name

_INTRODUCTION = """# Which attention implementations carry second order

Each row is `theria.curvature.audit` of one implementation: its output and its first and second derivatives
against the explicit softmax in float64 (errors as multiples of what the dtype is allowed: above 1 is wrong),
the least share of the curvature that each input keeps, the magnitude of the second-order path of the sequence
classifier through all parameters, through the attention's and through the head's, and |FULL - FO| / |FULL| by
the number of inner steps. An empty cell was not reached, because an earlier order raised.
"""


def write_markdown(reports: Sequence[AuditReport], notes: Mapping[str, str], path: Path) -> None:
    """Write or renew the sections of the devices and dtypes at hand; other sections stay as they are.

    Args:
        reports: the rows.
        notes: "implementation, dtype" -> what else is to be said of it, such as that and why it is absent.
        path: of the page.
    """
    sections = {}
    for title in dict.fromkeys(_title(report) for report in reports):
        mine = [report for report in reports if _title(report) == title]
        dtype = title.rpartition(", ")[2]
        own = {name.rpartition(", ")[0]: said for name, said in notes.items() if name.endswith(f", {dtype}")}
        sections[title] = "\n".join(_section(mine, own))
    renew_sections(path, _INTRODUCTION, sections)


def section_title(device: torch.device | str, dtype: torch.dtype) -> str:
    """Under which heading figures of a device and dtype stand."""
    device = torch.device(device)
    name = "CPU" if device.type == "cpu" else device_name(device)
    return f"{name}, {str(dtype).removeprefix('torch.')}"


def renew_sections(path: Path, introduction: str, sections: Mapping[str, str]) -> None:
    """Put sections under their second-level headings into a page; those under other headings stay.

    Args:
        path: the page; its folder is made, and the page begins with ``introduction`` where it has none yet.
        sections: heading -> body.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_text(encoding="utf-8") if path.exists() else introduction
    before, *parts = re.split(r"^## (.*)$", content, flags=re.MULTILINE)
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    text = [f"{before.strip()}\n"]
    text += [f"## {title}\n\n{body.strip()}\n" for title, body in {**found, **sections}.items()]
    path.write_text("\n".join(text), encoding="utf-8")


def _section(reports: Sequence[AuditReport], notes: Mapping[str, str]) -> list[str]:
    interpreted = [f"TRITON_INTERPRET={value}"] if (value := os.environ.get("TRITON_INTERPRET")) else []
    command = shlex.join([*interpreted, "python", "-m", "theria.curvature", *sys.argv[1:]])
    lines = [
        f"Command: `{command}`  ",
        f"Device: {device_name(reports[0].device)}  ",
        f"Versions: {versions()}, Python {platform.python_version()}",
        "",
        *markdown_table(HEADER, [summary(report) for report in reports]),
        "",
    ]
    for report in reports:
        lines += [f"- {report.name}: {remark}" for remark in remarks(report)]
    return lines + [f"- {name}: {said}" for name, said in notes.items()]


def _title(report: AuditReport) -> str:
    return section_title(report.device, report.dtype)
