"""Every configuration parses, runs, and explains its keys."""

import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
import yaml

import callbacks
from datamodules import CalibrationText, SyntheticSeqCls
from datamodules.recall_sequences import Recall
from lightning_modules import MemoryLM, MetaSeqClassifier
from lightning_modules.cli import main
from lightning_modules.memory_lm import Polarization
from theria.models.memory_lm import MemoryLM as Decoder

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # Lightning's cli.py calls jsonargparse by names that are going away
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # the tasks are made where they are used, and a machine with a GPU may test the CPU
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
    # a dry run has too few batches for the profiler's schedule
    pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule will be overridden:UserWarning"),
    # nor a run directory
    pytest.mark.filterwarnings("ignore:The PyTorchProfiler failed to export trace:UserWarning"),
]

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
MAIN = CONFIGS / "meta_seqcls.yaml"
JOBS = sorted(CONFIGS.glob("*.yaml"))
MEMORY = CONFIGS / "memory_lm.yaml"
MEMORY_60M = CONFIGS / "memory_lm_60m.yaml"
CLASSES = {
    MAIN: (MetaSeqClassifier, SyntheticSeqCls),
    MEMORY: (MemoryLM, CalibrationText),
    MEMORY_60M: (MemoryLM, CalibrationText),
}
# What makes a large job one step of which a test can wait for.
SMALLER = {
    MEMORY_60M: {
        "model.init_args.width": 32,
        "model.init_args.heads": 2,
        "model.init_args.memory_dim": 16,
        "model.init_args.window": 16,
        # the checks of annotations, which are on in tests, are nothing for a compiler
        "model.init_args.compile": False,
        "data.init_args.sequence_length": 256,
        "data.init_args.num_workers": 0,
    }
}
OVERLAYS = sorted(CONFIGS.glob("*/*.yaml"))
# Overlays of the other job.
OF_MEMORY = {"early_stopping_memory_lm", "fsdp", "learning_rate_search"}
# Packages that are no dependency: without one the overlay is refused.
NEEDS = {"device_stats": "psutil", "wandb": "wandb"}
# What holds other keys and needs no explanation of its own.
STRUCTURE = {"model", "data", "trainer", "class_path", "init_args", "logger", "callbacks"}


def arguments(path: Path) -> list[str]:
    base = MEMORY if path.stem in OF_MEMORY else MAIN
    files = [path] if path in JOBS else [base, path]
    return ["fit", *(part for file in files for part in ("--config", str(file)))]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the text is cached, for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("sys.argv", ["theria"])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)


def test_all_are_found() -> None:
    assert set(CLASSES) == set(JOBS)
    assert {path.stem for path in OVERLAYS} >= {"cpu", "gpu", "ddp", "fsdp", "debug"}
    assert {*JOBS, *OVERLAYS} == set(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", [*JOBS, *OVERLAYS], ids=lambda path: path.stem)
def test_it_parses_to_what_it_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*arguments(path), "--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for name, value in yaml.safe_load(path.read_text()).get("trainer", {}).items():
        if name.endswith("+"):
            assert holds(printed["trainer"][name[:-1]][-len(value) :], value)
        elif name not in STRUCTURE:
            assert holds(printed["trainer"][name], value)


def holds(printed: Any, given: Any) -> bool:
    """Whether what is printed has all that is given, class names with or without their modules."""
    if isinstance(given, dict):
        rest = {name: value for name, value in given.items() if name != "class_path"}
        same_class = printed.get("class_path", "").rpartition(".")[2] == given.get("class_path", "")
        return same_class and all(holds(printed[name], value) for name, value in rest.items())
    if isinstance(given, list):
        return len(printed) == len(given) and all(map(holds, printed, given))
    return bool(printed == given)


IN_THIS_PROCESS = [path for path in (*JOBS, *OVERLAYS) if path.stem not in ("ddp", "fsdp")]


@pytest.mark.parametrize("path", IN_THIS_PROCESS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    lacking = NEEDS.get(path.stem, "") and importlib.util.find_spec(NEEDS[path.stem]) is None
    if lacking or (path.stem == "gpu" and not torch.cuda.is_available()):
        with pytest.raises(SystemExit) as left:
            main(arguments(path))
        assert left.value.code == 2
        return
    smaller = [f"--{name}={value}" for name, value in SMALLER.get(path, {}).items()]
    main([*arguments(path), "--trainer.fast_dev_run", "true", *smaller])
    assert not list(Path().iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_run(engine: str) -> None:
    """The launcher repeats the command line for the second process, which is a new interpreter."""
    overlay = CONFIGS / "trainer" / f"{engine}.yaml"
    small = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    done = warm_python.run(None, [*arguments(overlay), *small], cwd=Path.cwd(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert "max_steps=1` reached" in done.stderr


@pytest.mark.parametrize("path", [*JOBS, *OVERLAYS], ids=lambda path: path.stem)
def test_every_key_is_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        match = re.match(r"\s*(?:- )?(\w+):", line)
        if match is None:
            continue
        explained = "#" in line or lines[number - 1].lstrip().startswith("#")
        is_callback = line.lstrip().startswith("- class_path")
        assert explained or (match[1] in STRUCTURE and not is_callback), f"{path.name}: {line}"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_names_every_setting_of_its_classes(path: Path) -> None:
    """A new argument of the model, the data or a callback has to appear, with its explanation."""
    config = yaml.safe_load(path.read_text())
    model, data = CLASSES[path]
    described = [(model, config["model"]), (data, config["data"])]
    described += [
        (getattr(callbacks, entry["class_path"]), entry) for entry in config["trainer"]["callbacks"]
    ]
    for kind, entry in described:
        named = set(entry.get("init_args", {}))
        assert named == set(inspect.signature(kind).parameters) - {"dirpath"}, kind


def test_the_interference_overlay_names_every_setting_with_its_default() -> None:
    (entry,) = yaml.safe_load((CONFIGS / "trainer" / "interference.yaml").read_text())["trainer"][
        "callbacks+"
    ]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(callbacks.InterferenceHeatmap).parameters.items()
    }
    assert entry["init_args"] == defaults | {"every_n_steps": 100}


@pytest.mark.parametrize("path", [MEMORY, MEMORY_60M], ids=lambda path: path.stem)
def test_the_memory_jobs_are_what_they_promise(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    for kind, given in ((Polarization, model["polarization"]), (Recall, data["recall"])):
        assert set(given) == {field.name for field in dataclasses.fields(kind)}
    assert data["recall"]["share"] <= 0.5  # at least half of the tokens are text
    assert min(data["recall"]["num_keys"], data["recall"]["num_values"]) >= 64
    assert (data["recall"]["min_pairs"], data["recall"]["max_pairs"]) == (8, 64)
    steps = config["trainer"]["max_steps"]
    assert model["lr_scheduler"]["init_args"]["total_steps"] == model["polarization"]["steps"] == steps
    # what is stored can be farther back than attention reaches
    assert model["blocks"] * (model["window"] - 1) < data["sequence_length"] - data["recall"]["query_span"]
    decided = (REPOSITORY / "docs" / "results" / "chunk_sizes.md").read_text()
    assert f"Default: **{model['chunk_size']}**" in decided
    with torch.device("meta"):
        sizes = set(inspect.signature(Decoder).parameters) - {"vocab"}
        decoder = Decoder(model["vocab_size"], **{name: model[name] for name in sizes})
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    least, most = (0, 2e6) if path == MEMORY else (54e6, 66e6)
    assert least < parameters < most
