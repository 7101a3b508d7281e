"""A program that is a fork meets what a new interpreter gives, and ends as one."""

import signal
from pathlib import Path

import pytest
import warm_python

PROGRAM = """
import atexit, os, sys, jaxtyping, theria.maml
atexit.register(print, "the end")
print(sys.argv[1:], os.getcwd(), os.environ.get("MARK"), sys.stdin.read() == "", __name__)
print("beartype" in repr(theria.maml.meta_gradient), file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_it_has_its_own_arguments_environment_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    for status, mark in ((0, "a"), (3, "b")):
        monkeypatch.setenv("MARK", mark)
        done = warm_python.run(script, [str(status)], cwd=tmp_path)
        assert done.returncode == status
        assert done.stdout == f"['{status}'] {tmp_path} {mark} True __main__\nthe end\n"
        assert done.stderr == "False\n"


def test_an_error_and_a_kill_are_told_and_harm_no_further_program(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text("raise ValueError('why')")
    done = warm_python.run(script, [])
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: why\n")
    script.write_text("import time; time.sleep(60)")
    assert warm_python.run(script, [], timeout=0.1).returncode == -signal.SIGKILL


def test_without_a_script_it_is_the_command_line() -> None:
    done = warm_python.run(None, ["fit", "--config", "configs/meta_seqcls.yaml", "--no_such_key", "1"])
    assert done.returncode == 2
    assert "theria: error: " in done.stderr
    assert "no_such_key" in done.stderr
