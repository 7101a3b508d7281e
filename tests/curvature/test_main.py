"""The command: what it takes, prints and writes, and its exit status in another project's CI."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from theria.curvature.__main__ import main

ROOT = Path(__file__).parents[2]
KERNELS = """
import torch
from theria.attention import scaled_dot_product_attention as attention

def sound(query, key, value, is_causal=False):
    return attention(query, key, value, is_causal=is_causal, backend="reference")

def off(query, key, value, is_causal=False):
    return 1.01 * sound(query, key, value, is_causal)

def cut(query, key, value, is_causal=False):
    out = sound(query, key, value, is_causal)
    return out.detach() + 0 * out

class Nested:
    kernel = staticmethod(sound)

def strange(query, key, value):
    return query

def leaves(query, key, value):
    raise SystemExit(0)

number = 3
"""


@pytest.fixture(autouse=True)
def kernels(tmp_path, monkeypatch):
    """A module in the current directory, which python would not find by itself."""
    name = f"kernels_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(KERNELS, encoding="utf-8")
    (tmp_path / "raises.py").write_text("raise OSError('no driver\\nat all')", encoding="utf-8")
    (tmp_path / "exits.py").write_text("raise SystemExit(0)", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


QUICKLY = ["--inner-steps", "1", "--steps", "1"]


@pytest.mark.parametrize(
    ("function", "options", "status"),
    [
        ("sound", [], 0),
        ("Nested.kernel", [], 0),
        ("off", [], 1),
        ("off", ["--fail-on", "SILENT_COLLAPSE"], 0),
        ("off", ["--fail-on", "WRONG_FORWARD"], 1),
        ("cut", ["--fail-on", "SILENT_COLLAPSE"], 1),
        ("cut", ["--fail-on", "NEVER"], 0),
    ],
)
def test_the_exit_status_says_whether_the_verdict_is_bad_enough(kernels, function, options, status, capsys):
    assert main([f"{kernels}:{function}", "--inner-steps", *options]) == status
    assert f"{kernels}:{function}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("absent_module:f", "cannot import absent_module: ModuleNotFoundError: No module named"),
        ("raises:f", "cannot import raises: OSError: no driver at all"),
        ("exits:f", "cannot import exits: SystemExit: 0"),
        ("{kernels}:absent", "{kernels} has no absent"),
        ("{kernels}:Nested.absent", "{kernels} has no Nested.absent"),
        ("{kernels}:number", "{kernels}:number is int, not a callable"),
        ("{kernels}", "'{kernels}' is not of the form module:function"),
        ("{kernels}:strange", "cannot tell the layout of strange"),
    ],
)
def test_what_cannot_be_audited_is_one_line_and_another_status(kernels, path, complaint, capsys):
    assert main([path.format(kernels=kernels), *QUICKLY]) == 2
    error = capsys.readouterr().err
    assert complaint.format(kernels=kernels) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["m:f", "--known"],
        ["m:f", "--steps", "0"],
        ["m:f", "--dtype", "int8"],
        ["m:f", "--fail-on", "SAFE"],
        ["m:f", "--seed", "-1"],
        ["m:f", "--device", "nonsense"],
        ["m:f", "--device", "meta"],
        ["m:f", "--device", "cuda:99"],
        ["m:f", "--shapes", "2x3x0x5x8"],
        ["m:f", "--shapes", "axb"],
        ["m:f", "--inner-steps", "-1"],
        ["m:f", "--csv", "."],
        ["m:f", "--json", "raises.py/audit.json"],
    ],
)
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    capsys.readouterr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_status_2(capsys):
    with pytest.raises(SystemExit):
        main(["m:f", "--device", "cuda"])
    assert "cuda is not here: there are 0 CUDA devices" in capsys.readouterr().err


def test_a_callable_cannot_choose_the_status(kernels, capsys):
    assert main([f"{kernels}:leaves", "--layout", "heads_first", *QUICKLY]) == 2
    assert "the callable ends the process (SystemExit: 0)" in capsys.readouterr().err


def test_files_that_cannot_be_written_after_all_are_status_2(kernels, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("theria.curvature.__main__.write_json", full)
    assert main([f"{kernels}:sound", "--inner-steps", "--json", "new/folder/audit.json"]) == 2
    assert "cannot write: no space left" in capsys.readouterr().err
    assert (tmp_path / "new" / "folder").is_dir()


def test_a_layout_that_cannot_be_told_can_be_given(kernels, capsys):
    assert main([f"{kernels}:strange", "--layout", "heads_first", "--inner-steps"]) == 1
    assert "HARD_FAIL" in capsys.readouterr().out


def test_files_hold_every_callable_and_dtype(kernels, tmp_path, capsys):
    names = [f"{kernels}:sound", f"{kernels}:cut"]
    asked = ["--dtype", "float32", "bfloat16", "--inner-steps"]
    files = ["--csv", "audit.csv", "--json", "audit.json", "--markdown", "audit.md"]
    assert main([*names, *asked, *files]) == 1
    assert len((tmp_path / "audit.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * 2
    found = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert [(r["name"], r["dtype"], r["verdict"]) for r in found] == [
        (names[0], "torch.float32", "SAFE"),
        (names[1], "torch.float32", "SILENT_COLLAPSE"),
        (names[0], "torch.bfloat16", "SAFE"),
        (names[1], "torch.bfloat16", "SILENT_COLLAPSE"),
    ]
    assert "## CPU, bfloat16" in (tmp_path / "audit.md").read_text(encoding="utf-8")
    assert "keeps 0.0%" in capsys.readouterr().out


def test_more_shapes_can_be_asked_for(kernels, tmp_path, capsys):
    arguments = [f"{kernels}:sound", "--inner-steps", "--shapes", "1x2x30x50x8", "--json", "audit.json"]
    assert main(arguments) == 0
    (report,) = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    cases = [case["case"] for case in report["cases"]]
    assert cases[-2:] == ["1x2, 30 queries, 50 keys, dim 8", "1x2, 30 queries, 50 keys, dim 8, causal"]
    assert len(cases) > 10
    with pytest.raises(SystemExit):
        main([f"{kernels}:sound", "--shapes", "2x3"])
    capsys.readouterr()


def test_the_module_runs_from_anywhere_and_finds_what_stands_there(kernels, tmp_path):
    command = [sys.executable, "-m", "theria.curvature", f"{kernels}:off", "--inner-steps"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "WRONG_FORWARD" in done.stdout


def test_known_implementations_are_audited_or_listed_as_absent(capsys, tmp_path):
    names = ["theria custom", "torch FLASH", "torch EFFICIENT", "flash-attn"]
    arguments = ["--known", *names, "--inner-steps", "1", "--steps", "1", "--csv", "known.csv"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "SAFE" in out
    assert "FIRST_ORDER_ONLY" in out
    assert "flash-attn, float32: absent, the package flash_attn is not installed" in out.replace("\n", " ")
    lines = (tmp_path / "known.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 3
    assert any("No viable backend" in line and "HARD_FAIL" in line for line in lines)
    assert main(["--known", "nonsense", "--inner-steps"]) == 2
    assert "--known does not know nonsense" in capsys.readouterr().err
    assert main(["--known", "torch FLASH", "--inner-steps", "--fail-on", "FIRST_ORDER_ONLY"]) == 1
