"""The cost of probes from the times of steps, the decision, and the page that holds it."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from experiments.training_gates import niah_frequency
from experiments.training_gates.__main__ import main
from experiments.training_gates.niah_frequency import Cost, cost_of, locked, measure
from theria.memory.needle import Mean

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]

REPOSITORY = Path(__file__).parents[3]
CONFIG = REPOSITORY / "configs" / "memory_lm.yaml"


def ended(steps, between, *, step, probe, after=lambda number: 0.0):
    """Times at which steps 1, 2, ... end: a probe behind every between-th, and a slower step behind it."""
    took = [
        step(number)
        + (probe(number) if number % between == 0 else 0.0)
        + (after(number) if number % between == 1 and number > 1 else 0.0)
        for number in range(1, steps + 1)
    ]
    return list(itertools.accumulate(took))


def test_a_probe_costs_what_it_takes_and_what_it_slows_down():
    times = ended(5 * 7 - 1, 5, step=lambda n: 0.2, probe=lambda n: 0.6, after=lambda n: 0.1)
    found = cost_of(times, 5)
    assert found.step.value == pytest.approx(0.2)
    assert found.probe.value == pytest.approx(0.7)
    assert found.steps.value == pytest.approx(3.5)
    assert found.overhead(1000) == pytest.approx((0.0035, 0.0035))


def test_the_first_probe_is_left_out():
    times = ended(5 * 7 - 1, 5, step=lambda n: 0.2, probe=lambda n: 9.0 if n == 5 else 0.6)
    found = cost_of(times, 5)
    assert found.first == pytest.approx(9.0)
    assert found.probe.high == pytest.approx(0.6)


def test_a_machine_that_slows_down_does_not_widen_the_interval():
    def speed(number):
        return 1.0 + 0.03 * number

    times = ended(6 * 22 - 1, 6, step=lambda n: 0.2 * speed(n), probe=lambda n: 0.4 * speed(n))
    found = cost_of(times, 6)
    assert found.step.high > 1.15 * found.step.value
    assert found.steps.value == pytest.approx(2.0, rel=0.2)
    assert found.steps.high < 1.05 * found.steps.value


def test_every_probe_counts_in_its_interval():
    times = ended(4 * 5 - 1, 4, step=lambda n: 1.0, probe=lambda n: {8: 1.0, 12: 2.0, 16: 3.0}.get(n, 0.0))
    expected = Mean.of(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    found = cost_of(times, 4)
    assert (found.steps.value, found.steps.high) == pytest.approx((expected.value, expected.high))
    assert found.overhead(100)[1] == pytest.approx(expected.high / 100)


def in_steps(value, high):
    return Cost(Mean(value, 0.0, high), Mean(value, 0.0, high), Mean(1.0, 1.0, 1.0), value)


@pytest.mark.parametrize(
    ("high", "expected"),
    [(0.19, 100), (0.2, 100), (0.21, 200), (1.9, 1000), (2.1, 2000), (19.0, 10_000), (22.0, 5000)],
)
def test_the_upper_end_decides(high, expected):
    assert locked(in_steps(0.1, high)) == expected


def test_too_dear_a_probe_has_no_frequency():
    with pytest.raises(ValueError, match="even every 10000 steps a probe may cost more than 1%"):
        locked(in_steps(50.0, 101.0))


def test_the_configured_frequency_is_the_locked_one():
    page = (REPOSITORY / "docs" / "results" / "niah_frequency.md").read_text()
    (decided,) = re.findall(r"Locked: \*\*every (\d+) steps\*\*", page)
    callbacks = yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks"]
    (probe,) = (entry for entry in callbacks if entry["class_path"] == "NIAHProbe")
    assert probe["init_args"]["every_n_steps"] == int(decided)
    (most,) = re.findall(rf"\| {int(decided):,} \| [\d.]+% \| ([\d.]+)% \|", page)
    assert float(most) < 1


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["training_gates", "niah-frequency"])
    for number in range(40):
        Path(f"{number}.txt").write_text("\n\n".join(f"{number} of {line * number}" for line in range(9)))
    config = yaml.safe_load(CONFIG.read_text())
    sizes = {"width": 16, "heads": 2, "window": 6, "memory_dim": 8, "slots": 4, "chunk_size": 8}
    config["model"]["init_args"] |= sizes
    prose = {"built_in": None, "files": ["*.txt"]}
    config["data"]["init_args"] |= {
        "domains": {"prose": prose},
        "sequence_length": 64,
        "batch_size": 2,
        "cache_dir": "cache",
        "val_fraction": 0.2,
        "test_fraction": 0.2,
    }
    config["data"]["init_args"]["recall"] |= {"max_pairs": 8, "query_span": 16}
    config["trainer"]["enable_model_summary"] = False
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


TIMES = ended(19, 4, step=lambda n: 0.2, probe=lambda n: 0.6)


def test_the_page_holds_figures_and_decision(small, capsys, monkeypatch):
    measured = []

    def timed(ended, between):
        """Times of our own in the place of those of the run, which differ by machine."""
        measured.extend(ended)
        return cost_of(TIMES, between)

    monkeypatch.setattr(niah_frequency, "cost_of", timed)
    options = ["--config", str(small), "--probes", "3", "--between", "4", "--out", "docs/page.md"]
    main(["niah-frequency", *options])
    text = Path("docs/page.md").read_text()
    assert text in capsys.readouterr().out
    assert len(measured) == len(TIMES)
    assert measured == sorted(measured)
    assert cost_of(measured, 4).step.low > -math.inf
    for part in (
        "a probe every 4 steps, 3 probes",
        "- probe: 600 ms [600, 600] (the first of a run: 600 ms)",
        "- step: 200 ms [200, 200]",
        "- a probe in steps: 3.00 [3.00, 3.00]",
        "| 1,000 | 0.300% | 0.300% |",
        "Locked: **every 2000 steps**",
    ):
        assert part in text
    assert not list(Path().glob("runs*"))


def test_wrong_measurements_are_refused(small):
    for numbers in ({"probes": 2, "between": 4}, {"probes": 3, "between": 3}):
        with pytest.raises(ValueError, match="at least 3 probes and 4 steps"):
            measure("cpu", small, **numbers)
    config = yaml.safe_load(small.read_text())
    config["trainer"]["callbacks"] = []
    small.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="with one NIAHProbe"):
        measure("cpu", small, probes=3, between=4)
