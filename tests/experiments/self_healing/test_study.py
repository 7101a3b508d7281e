"""Injected faults in real short trainings, what is counted of them, and the page."""

import dataclasses
import importlib.util
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import warm_python

from callbacks import PPLDeltaRollback
from callbacks.perplexity_baseline import PerplexityBaseline
from experiments.self_healing import __main__ as command
from experiments.self_healing import cost, figures
from experiments.self_healing.faults import FAULTS
from experiments.self_healing.jobs import COST_JOBS, JOBS
from experiments.self_healing.runs import HEALTHY, Figures, Run, load, perform, train

pytestmark = [
    pytest.mark.slow,
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),  # made on the spot
    pytest.mark.filterwarnings("ignore:training goes back from step:UserWarning"),  # what is tested here
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
    # a run that is watched without validation
    pytest.mark.filterwarnings("ignore:.*val_check_interval.*:UserWarning"),
]

# All kinds take a minute; THERIA_ALL_FAULTS=1 runs them.
SHORT = ("spike", "nan_gradient", "corrupted", "rate", "around_checkpoint")
COUNTED = [
    name
    for name, fault in FAULTS.items()
    if fault.is_counted and (name in SHORT or os.environ.get("THERIA_ALL_FAULTS"))
]


def tiny_job() -> Any:
    """The module beside this one; test folders are no packages."""
    spec = importlib.util.spec_from_file_location("tiny_job", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROGRAM = Path(__file__).with_name("tiny_job.py")
JOB = tiny_job()
TINY, STEPS, run_of = JOB.TINY, JOB.STEPS, JOB.run_of


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JOBS, "tiny", TINY)
    monkeypatch.setitem(COST_JOBS, "tiny", TINY)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all runs."""
    directory = tmp_path_factory.mktemp("work")
    done = warm_python.run(PROGRAM, [str(directory), HEALTHY, *COUNTED, "for_ever"])
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Figures:
    return load(run_of(HEALTHY), work)


def test_a_healthy_run_is_left_alone(undisturbed: Figures) -> None:
    assert undisturbed["rollbacks"] == []
    assert [step for step, _ in undisturbed["losses"]] == list(range(1, STEPS + 1))
    assert undisturbed["recorded_once"]
    losses = [loss for _, loss in undisturbed["losses"]]
    assert figures.alarms(losses, "plain", patience=1) > 20


@pytest.mark.parametrize("fault", COUNTED)
def test_a_fault_is_caught_and_training_ends_as_the_undisturbed(
    fault: str, work: Path, undisturbed: Figures
) -> None:
    found = load(run_of(fault), work)
    result = figures.outcome(found, undisturbed)
    assert len(result.caught_after) == FAULTS[fault].count
    # a rate 100 times too high has to move the weights of this small model first
    assert result.is_caught or (fault == "rate" and result.caught_after[0] is not None)
    assert abs(result.loss_change) < 0.01
    assert found["recorded_once"]
    assert found["stopped"] is None


def test_what_does_not_stop_to_break_ends_at_the_cap_with_its_reason_and_the_last_healthy_checkpoint(
    work: Path,
) -> None:
    found = load(run_of("for_ever"), work)
    assert len(found["rollbacks"]) == 3
    assert "the perplexity of step 320" in found["stopped"]
    assert "3 of at most 3 rollbacks are used up" in found["stopped"]
    assert found["stopped"].endswith("the last healthy checkpoint is RUN/checkpoints/rollback_000200.ckpt")
    assert found["validation"] == {}


def test_a_fault_that_nothing_takes_back_does_harm(
    undisturbed: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test of healing."""
    monkeypatch.setattr(PPLDeltaRollback, "between_batches", lambda *_: None)
    found = train(run_of("rate"))
    result = figures.outcome(found, undisturbed)
    assert result.caught_after == (None,)
    assert not result.is_caught
    assert not result.is_healed


def test_alarms_are_those_of_a_naive_loop() -> None:
    generator = random.Random(0)
    losses = [2 + generator.gauss(0, 0.05) for _ in range(400)]
    naive, mean = 0, 0.0
    for number, loss in enumerate(losses, start=1):
        perplexity = math.exp(loss)
        naive += number > 100 and perplexity > 1.05 * mean
        mean += max(1 / number, 2 / 101) * (perplexity - mean)
    assert figures.alarms(losses, "plain", patience=1) == naive > 20
    assert figures.alarms(losses, "robust", patience=2) == 0


def test_poison_does_not_move_the_baseline_and_moves_one_that_absorbs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = random.Random(0)
    losses = [2 + generator.gauss(0, 0.05) for _ in range(400)]
    assert figures.poisoned_shift(losses) < 0.01
    judge = PerplexityBaseline.judge

    def absorbing(self: PerplexityBaseline, loss: float) -> Any:
        judged = judge(self, loss)
        if judged.is_outlier:
            self._absorb(judged.perplexity, loss)
        return judged

    monkeypatch.setattr(PerplexityBaseline, "judge", absorbing)
    assert figures.poisoned_shift(losses) > 1


def test_steps_to_catch_count_from_the_first_broken_one_of_each_fault() -> None:
    steps = [*range(1, 31), *range(11, 41)]
    losses = [(step, 1.0) for step in steps]
    one = {"job": "tiny", "validation": {}, "losses": losses}
    spike = figures.outcome({**one, "fault": "spike", "hit": [29, 30]}, {})
    assert spike.caught_after == (1,)
    assert spike.is_caught
    assert figures.outcome({**one, "fault": "spike", "hit": [27, 28]}, {}).is_caught
    assert not figures.outcome({**one, "fault": "spike", "hit": [26, 28]}, {}).is_caught
    assert figures.outcome({**one, "fault": "around_checkpoint", "hit": [30, 35]}, {}).caught_after == (
        0,
        None,
    )


def test_hooks_that_take_longer_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds() -> float:
        """Of the hooks, a step."""
        found = cost.measure("tiny", "cpu", blocks=1)
        assert len(found["shares"]) == 1
        assert found["steps"] == 100
        assert 0 < found["shares"][0] < 1
        assert found["save_seconds"] > 0
        return float(found["shares"][0] * found["step_seconds"])

    plain = seconds()
    hook = PPLDeltaRollback.on_train_batch_end

    def slow(*args: Any) -> None:
        time.sleep(0.01)
        hook(*args)

    monkeypatch.setattr(PPLDeltaRollback, "on_train_batch_end", slow)
    assert seconds() > plain + 0.009


def test_the_command_goes_on_with_what_is_missing_and_writes_the_page(
    tmp_path: Path, undisturbed: Figures, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = command.planned([0, 1], STEPS, "cpu", ["tiny"])
    assert len(runs) == 2 + len(FAULTS)
    for each in runs:
        spiked = [(step, loss) for step, loss in undisturbed["losses"] if step <= 331]
        faulty = {
            "losses": [*spiked, *undisturbed["losses"][200:]],
            "hit": [330, 331],
            "rollbacks": [{"first_bad": 330, "at": 331, "to": 200, "reason": "why"}],
        }
        content = undisturbed | ({} if each.fault == HEALTHY else faulty) | dataclasses.asdict(each)
        (tmp_path / each.file_name).write_text(json.dumps(content))
    monkeypatch.setattr(command, "JOBS", {"tiny": TINY})
    page = tmp_path / "page.md"
    arguments = ["--configurations", "tiny", "--steps", str(STEPS), "--seeds", "0", "1", "--cost-blocks", "0"]
    monkeypatch.setattr("sys.argv", ["self_healing", *arguments])
    command.main([*arguments, "--jobs", "1", "--work", str(tmp_path), "--out", str(page)])
    text = page.read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert f"**0 rollbacks in {2 * STEPS} healthy steps**" in text
    # the second of two faults was not found
    assert "**9 of 10 caught within 3 steps; 10 of 10 end within 1% of the undisturbed run**" in text
    assert "| NaN in the loss | tiny | 1 | 330, 330, 331 | 200 |" in text
    assert "| two scaled batches with a checkpoint between them | tiny | 1, not |" in text


def test_costs_can_be_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"step_seconds": 0.1, "shares": [0.001, 0.002], "save_seconds": 0.05}
    monkeypatch.setattr(command, "measure", lambda job, device, _: {**cost, "job": job, "device": device})
    monkeypatch.setattr("sys.argv", ["self_healing"])
    out = tmp_path / "page.md"
    command.main(["--costs-alone", "--device", "cuda", "--work", str(tmp_path), "--out", str(out)])
    text = out.read_text()
    assert "| configs/memory_lm_60m.yaml, unchanged | cuda | 100.00 | 0.150% ± 0.635% |" in text
    assert "False alarms" not in text


def test_a_run_that_has_its_file_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Run] = []
    monkeypatch.setattr("experiments.self_healing.runs.train", lambda run: done.append(run) or {"a": 1})
    for _ in range(2):
        perform(run_of(HEALTHY), tmp_path)
    assert done == [run_of(HEALTHY)]
    assert json.loads((tmp_path / run_of(HEALTHY).file_name).read_text()) == {"a": 1}
