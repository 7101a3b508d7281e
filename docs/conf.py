"""Sphinx configuration: `python -m sphinx -W --keep-going -b html docs build/docs`."""

import re
from typing import Any

project = "theria"
author = "theria's contributors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["results/*_all.csv"]
html_theme = "furo"
default_role = "code"
autodoc_inherit_docstrings = False  # what torch and Lightning say of their methods stands in their pages
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
# attributes stand in the class's docstring, where fields of named tuples and dataclasses would stand twice
napoleon_use_ivar = True
napoleon_include_init_with_doc = False
python_display_short_literal_types = True
# figures' pages are made by commands, and some begin a section at the level that their tables need
suppress_warnings = ["myst.header"]

_DIRECTIVE = re.compile(r"^(\s*)\.\. \w+::")


def _as_written(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with formulas: bars and stars mean themselves outside of directives."""
    margin: int | None = None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if found := _DIRECTIVE.match(line):
            margin = len(found[1])
        elif margin is None or (line.strip() and indent <= margin):
            margin = None
            lines[number] = re.sub(r"(?<!`)([|*])(?!`)", r"\\\1", line)


def setup(app: Any) -> None:
    """Register the hook on docstrings, before napoleon's."""
    app.connect("autodoc-process-docstring", _as_written, priority=100)
