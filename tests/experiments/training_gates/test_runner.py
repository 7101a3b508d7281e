"""The command: every gate on a small model through the command line, the page, and the exit status."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks import NIAHProbe, UnhealthyTrainingError, read_metrics
from experiments.training_gates import chunk_sizes, niah_frequency, runner, trained
from experiments.training_gates.__main__ import main
from experiments.training_gates.gate import TITLES, Gate
from experiments.training_gates.niah_frequency import Cost
from experiments.training_gates.trained import merged
from theria.memory.needle import Mean

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
    pytest.mark.filterwarnings("ignore:training goes back from step:UserWarning"),
]

CONFIG = Path(__file__).parents[3] / "configs" / "memory_lm.yaml"
SMALL: dict[str, Any] = {
    "model": {
        "init_args": {
            "width": 16,
            "heads": 2,
            "window": 6,
            "memory_dim": 8,
            "slots": 4,
            "sample_tokens": 0,
        }
    },
    "data": {
        "init_args": {
            "domains": {name: {"built_in": None, "files": [f"{name}*.txt"]} for name in ("prose", "sources")},
            "sequence_length": 64,
            "batch_size": 4,
            "train_sequences_per_epoch": 400,
            "val_sequences": 4,
            "recall": {"min_pairs": 2, "max_pairs": 4, "queries": 2, "query_span": 8, "num_val_sequences": 4},
            "val_fraction": 0.2,
            "test_fraction": 0.2,
            "cache_dir": "cache",
        }
    },
    "trainer": {"log_every_n_steps": 10, "enable_model_summary": False},
}
STEPS = 60


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a small training in a directory of its own, with decisions at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["training_gates"])
    for name in ("prose", "sources"):
        for number in range(40):
            text = "\n\n".join(f"{name} {number} of {line * number}" for line in range(9))
            Path(f"{name}{number}.txt").write_text(text)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    pages = Path("docs/results")
    pages.mkdir(parents=True)
    (pages / "chunk_sizes.md").write_text("Locked set: {8, 16, 32, 64}. Default: **64**.")
    (pages / "niah_frequency.md").write_text("Locked: **every 1000 steps**.")
    return ["--config", str(CONFIG), "small.yaml", "--steps", str(STEPS), "--work", "work"]


@pytest.mark.slow
def test_all_gates_are_measured_on_what_was_trained(arguments, monkeypatch, capsys):
    """Untrained as it is the model recalls nothing, and its steps are short beside a probe."""
    narrow = partial(chunk_sizes.measure, dim=8)
    monkeypatch.setattr(chunk_sizes, "measure", lambda *a, dim, **options: narrow(*a, **options))
    monkeypatch.setattr(chunk_sizes, "default_of", lambda *a: 64)
    monkeypatch.setattr("experiments.training_gates.locked_chunks.SLOWER", 100.0)
    measured = []
    costs = niah_frequency.measure
    monkeypatch.setattr(niah_frequency, "measure", lambda *a, **k: measured.append(costs(*a, **k)) or cheap())
    with pytest.warns(UserWarning, match="goes back"), pytest.raises(SystemExit) as left:
        main([*arguments, "--out", "page.md"])
    assert left.value.code == 1
    assert measured[0].probe.value > 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[G2-") or "/8" in line]
    assert [line[1:5] for line in said[:-1]] == list(TITLES)
    verdicts = {line[1:5]: "PASSED (" in line for line in said[:-1]}
    assert verdicts == {name: name != "G2-5" for name in TITLES}
    assert said[-1] == "7/8"
    page = Path("page.md").read_text()
    for name, title in TITLES.items():
        assert f"| {name} | {title} |" in page
    assert all(line.count("|") == 6 for line in page.splitlines() if line.startswith("|"))
    assert "**7/8**" in page
    table = read_metrics(Path("work/stable/version_0/metrics.jsonl"))
    assert table["step"].tolist() == list(range(1, STEPS + 1))
    loss = table["loss"]
    assert f"loss {loss.iloc[:6].mean():.3f} -> {loss.iloc[-6:].mean():.3f}" in page
    assert "among 100 pairs" in page
    # every schedule is as long as the run
    config = yaml.safe_load(Path("work/stable/version_0/config.yaml").read_text())
    model = config["model"]["init_args"]
    assert model["polarization"]["steps"] == model["lr_scheduler"]["init_args"]["total_steps"] == STEPS


def cheap() -> Cost:
    return Cost(Mean(1.0, 1.0, 1.0), Mean(0.1, 0.1, 0.1), Mean(0.1, 0.1, 0.1), 0.0)


def fake_gates(**passed: bool) -> dict[str, Any]:
    def gate(name: str, options: Any, run: Any) -> Gate:
        return Gate(name, f"{name} of {run}", "any", passed.get(name.replace("-", "_"), True))

    return {name: partial(gate, name) for name in TITLES}


@pytest.mark.parametrize("failing", [None, "G2-1", "G2-4", "G2-8"])
def test_the_status_is_1_where_any_gate_fails(arguments, monkeypatch, capsys, failing):
    monkeypatch.setattr(runner, "train", lambda *args, **options: "a run")
    monkeypatch.setattr(runner, "GATES", fake_gates(**{str(failing).replace("-", "_"): False}))
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--out", "page.md"])
    assert left.value.code == (0 if failing is None else 1)
    assert capsys.readouterr().out.splitlines()[-1] == ("8/8" if failing is None else "7/8")
    page = Path("page.md").read_text()
    assert page.count("**failed**") == (0 if failing is None else 1)
    assert "G2-3 of a run" in page


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), UnhealthyTrainingError("ill", None)])
def test_training_that_ends_early_fails_every_gate(arguments, monkeypatch, capsys, error):
    def broken(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(runner, "train", broken)
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--out", "page.md"])
    assert left.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0/8"
    assert all(f"training ended with {type(error).__name__}: {error}" in line for line in lines[:-1])
    assert len(lines) == 9


def test_a_spike_that_ends_training_fails_its_gate_alone(arguments, monkeypatch, capsys):
    def stopped(options: Any, run: Any) -> Gate:
        raise UnhealthyTrainingError("3 of at most 3 rollbacks are used up", None)

    monkeypatch.setattr(runner, "train", lambda *args, **options: "a run")
    monkeypatch.setattr(runner, "GATES", fake_gates() | {"G2-6": stopped})
    with pytest.raises(SystemExit):
        main([*arguments, "--out", "page.md"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "7/8"
    assert "FAILED (UnhealthyTrainingError: 3 of at most 3" in lines[5]


@pytest.mark.parametrize("reason", [UnhealthyTrainingError("ill", None), ValueError("a setting")])
def test_how_training_ended_is_told_where_the_command_line_leaves(tmp_path, monkeypatch, reason):
    """`theria` says the reason in one line and leaves with a status."""

    def leave(args: Any) -> None:
        try:
            raise reason
        except Exception:
            raise SystemExit(1)  # noqa: B904  # as the command line does it

    monkeypatch.setattr(trained, "TheriaCLI", leave)
    expected = UnhealthyTrainingError if isinstance(reason, UnhealthyTrainingError) else SystemExit
    with pytest.raises(expected):
        trained.train([CONFIG], [], steps=1, device="cpu", work=tmp_path, name="x")


def test_a_configuration_without_a_callback_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {callbacks: [{class_path: callbacks.RNGState}]}")
    run: Any = trained.Trained(None, None, [], tmp_path, nullcontext, 0.0)  # type: ignore[arg-type]
    for ask in (run.callback, run.settings):
        with pytest.raises(ValueError, match=r"has no NIAHProbe among trainer\.callbacks"):
            ask(NIAHProbe)


def test_all_eight_are_there():
    assert list(runner.GATES) == list(TITLES) == [f"G2-{number}" for number in range(1, 9)]


def test_later_configurations_are_laid_over_earlier_ones(tmp_path):
    for name, content in (
        ("a", {"model": {"width": 1, "depth": 2}, "callbacks": [1, 2]}),
        ("b", {"model": {"width": 3}, "callbacks": [4], "seed": 5}),
    ):
        (tmp_path / name).write_text(yaml.safe_dump(content))
    assert merged([tmp_path / "a", tmp_path / "b"]) == {
        "model": {"width": 3, "depth": 2},
        "callbacks": [4],
        "seed": 5,
    }
