"""Reports of many lines become one that says what is wrong."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_modules.cli_errors import condense, fail, is_about_settings

UNION = """Parser key "{key}":

  - Expected a path but {value} either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [{types}, <class 'NoneType'>]
  Errors:
    - {reason}
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: {value}
"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Option 'widht' is not accepted", "Option 'widht' is not accepted"),
        (
            "Parser key \"width\":\n  Expected a <class 'int'>. Got value: abc",
            "width: Expected a int. Got value: abc",
        ),
        (
            "Parser key \"config\": File does not exist: '/a.yaml'",
            "config: File does not exist: '/a.yaml'",
        ),
        (
            UNION.format(key="lr", value="abc", types="<class 'float'>", reason="Expected a <class 'float'>"),
            "lr: Expected a float; got abc",
        ),
        (
            UNION.format(
                key="model",
                value="Tinny",
                types="<class 'M'>",
                reason="Expected a dot import path string: Tinny",
            ),
            "model: there is no class Tinny; give a known name or an import path",
        ),
        (
            "Does not validate against any of the Union subtypes\n"
            "Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]\n"
            "Errors:\n  - width must be at least 1, got 0\n  - Expected a <class 'NoneType'>\n"
            "Given value type: <class 'jsonargparse._namespace.Namespace'>\n"
            "Given value: Namespace(class_path='Tiny', init_args=Namespace(width=0))",
            "width must be at least 1, got 0",
        ),
        ("No supported gpu backend found!", "No supported gpu backend found!"),
        ("two\nlines", "two lines"),
    ],
)
def test_one_line_is_left(message: str, line: str) -> None:
    assert condense(message) == line


def test_failing_writes_one_line_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        fail("first\n  second")
    assert left.value.code == 2
    assert capsys.readouterr().err == "theria: error: first second\n"


def raised(action: object) -> Exception:
    try:
        action()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def check() -> None:
    raise ValueError("must be positive")


def training_step() -> None:
    check()


@pytest.mark.parametrize(
    ("action", "blames_settings"),
    [
        (check, True),
        (lambda: torch.optim.Adam([torch.zeros(1)], lr=-1), True),
        (training_step, False),
        (lambda: int("three"), False),
        (lambda: len(3), False),  # type: ignore[arg-type]
        (lambda: {}["a"], False),
    ],
    ids=["a check", "an optimiser's check", "in a step", "int()", "len()", "a missing key"],
)
def test_checks_outside_of_the_steps_blame_the_settings(action: object, blames_settings: bool) -> None:
    assert is_about_settings(raised(action)) is blames_settings


def test_lightnings_own_complaints_blame_the_settings() -> None:
    assert is_about_settings(MisconfigurationException("no logger"))
    assert not is_about_settings(RuntimeError("out of memory"))
