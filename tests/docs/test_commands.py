"""Every command of the README and of the pages is one that its program understands, and that a test runs."""

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.cli import main as theria

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SCRIPTS = {
    "theria-operator-sensitivity": "experiments.operator_sensitivity",
    "theria-curvature": "theria.curvature",
}

# What runs a command, by how it begins (the longest counts): a test, or the reason that there is none.
RUN_BY = {
    "python3 -m venv .venv": "CI runs it",
    "tensorboard": "it serves until it is stopped",
    "theria fit --ckpt_path": (
        "lightning_modules/test_resume.py::test_a_killed_run_ends_as_the_uninterrupted_one"
    ),
    "theria fit --config configs/meta_seqcls.yaml": "configs/test_configs.py::test_it_runs",
    "theria fit --config configs/meta_seqcls.yaml --config": (
        "configs/test_configs.py::test_two_processes_run"
    ),
    "theria fit --config configs/memory_lm.yaml": "configs/test_configs.py::test_it_runs",
    "theria fit --config configs/memory_lm.yaml --config": (
        "configs/test_habits.py::test_validation_and_evaluation_see_the_average"
    ),
    "theria fit --config configs/memory_lm.yaml --config configs/trainer/learning_rate_search.yaml": (
        "configs/test_habits.py::test_the_search_suggests_a_rate_and_trains_nothing"
    ),
    "theria fit --config configs/meta_seqcls.yaml --config configs/trainer/early_stopping_meta_seqcls.yaml": (
        "configs/test_habits.py::test_early_stopping_stays_stopped_until_it_gets_more_patience"
    ),
    "sbatch": "configs/test_habits.py::test_the_slurm_script_goes_on_until_it_is_done",
    "theria fit --config configs/memory_lm_60m.yaml": "configs/test_configs.py::test_it_runs",
    "theria fit --model.help": (
        "lightning_modules/test_cli.py::test_help_explains_the_model_by_its_short_name"
    ),
    "theria test": "lightning_modules/test_cli.py::test_validate_and_test_take_a_run",
    "python -m experiments.memory_study": (
        "experiments/memory_study/test_study.py::test_a_page_of_two_variants"
    ),
    "python -m experiments.training_gates": (
        "experiments/training_gates/test_runner.py::test_all_gates_are_measured_on_what_was_trained"
    ),
    "python -m experiments.training_gates chunk-sizes": (
        "experiments/training_gates/test_chunk_sizes.py::test_the_page_names_set_and_default"
    ),
    "python -m benchmarks.scaling": "it takes minutes; benchmarks/test_scaling.py tests its parts",
    "python -m benchmarks.memory": "it takes minutes; benchmarks/test_memory.py tests its parts",
    "python -m theria.curvature": (
        "curvature/test_main.py::test_the_module_runs_from_anywhere_and_finds_what_stands_there"
    ),
    "theria-operator-sensitivity": (
        "experiments/operator_sensitivity/test_cli.py::test_one_command_gives_tables_pictures_and_page"
    ),
    "python -m experiments.operator_sensitivity": (
        "experiments/operator_sensitivity/test_cli.py::test_one_command_gives_tables_pictures_and_page"
    ),
    "python docs/screenshots.py": "callbacks/test_dashboard.py::test_a_browser_sees_the_charts",
    "python -m sphinx": "docs/test_build.py::test_the_pages_build_without_a_warning",
    "python -m experiments.interference": (
        "experiments/interference/test_main.py::test_with_a_ridge_the_deviation_is_stated_and_pooled_has_none"
    ),
}


class Parsed(Exception):
    """Raised in place of what a program does behind its parser."""


def commands() -> list[str]:
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if command := re.sub(r"\s+#.*", "", line).strip():
                    found[command] = None
    return list(found)


def beginning_of(command: str) -> str:
    return max((known for known in RUN_BY if command.startswith(known)), key=len, default="")


@pytest.mark.parametrize("command", commands())
def test_a_test_runs_it_or_a_reason_is_given(command: str) -> None:
    named = RUN_BY[beginning_of(command)]
    if "::" in named:
        file, name = named.split("::")
        assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text(), named


def test_no_reason_is_left_of_a_command_that_went() -> None:
    assert {beginning_of(command) for command in commands()} == set(RUN_BY)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("theria fit --config")])
def test_the_application_understands_it(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    _, *arguments = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        theria([*arguments, "--print_config"])
    assert ended.value.code in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in commands() if re.match("python -m (?!sphinx)|theria-", c)])
def test_a_program_understands_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # some parsers ask whether the device is there
    here = command.removeprefix("python -m ").replace("--device cuda", "--device cpu")
    program, *arguments = shlex.split(here)
    parse_known = argparse.ArgumentParser.parse_known_args

    def parse_all(parser: argparse.ArgumentParser, given: Any = None, namespace: Any = None) -> None:
        _, unknown = parse_known(parser, given, namespace)
        assert not unknown
        raise Parsed

    def parse_some(parser: argparse.ArgumentParser, given: Any = None, namespace: Any = None) -> None:
        parse_known(parser, given, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_all)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_some)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    module = SCRIPTS.get(program, program)
    package = importlib.util.find_spec(module)
    assert package is not None
    if package.submodule_search_locations:
        module += ".__main__"
    with pytest.raises(Parsed):
        importlib.import_module(module).main()
