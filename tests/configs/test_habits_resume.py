"""Habits that keep a state: a run that is killed with them on, and resumed, ends as the uninterrupted one."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import warm_python
import yaml
from small_jobs import BASE, CONFIGS, NAME, TRAINER, write_jobs

from lightning_modules.checkpoint_io import read_checkpoint

KILLS = ["inside a validation"]
STOPPED = 12
"""Validated at 4, 8 and 12 and never better by 10 than at first: two validations end the patience."""
STOPPING = {"meta": "early_stopping_meta_seqcls", "text": "early_stopping_memory_lm"}

pytestmark = pytest.mark.slow
both = pytest.mark.parametrize("job", ["meta", "text"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of all runs by job, each made by one process that forks them."""
    jobs = tmp_path_factory.mktemp("jobs")
    write_jobs(jobs)
    habits = [
        yaml.safe_load((CONFIGS / "trainer" / f"{name}.yaml").read_text())["trainer"]["callbacks+"][0]
        for name in ("weight_averaging", "learning_rate_monitor")
    ]
    made = {}
    for job, name in STOPPING.items():
        overlay = yaml.safe_load((CONFIGS / "trainer" / f"{name}.yaml").read_text())
        (stopping,) = overlay["trainer"]["callbacks+"]
        stopping["init_args"] |= {"patience": 2, "min_delta": 10}
        checkpoints = {"class_path": "ResumableCheckpoint", "init_args": {"every_n_steps": 3, "keep_last": 2}}
        callbacks = [*TRAINER["callbacks"][:-1], checkpoints, stopping, *habits]
        settings = {"max_steps": 14, "val_check_interval": 4, "callbacks": callbacks}
        (jobs / "habits.yaml").write_text(yaml.safe_dump({"trainer": settings}))
        made[job] = tmp_path_factory.mktemp(job)
        files = [str(BASE[job]), str(jobs / f"{job}.yaml"), str(jobs / "habits.yaml")]
        program = CONFIGS.parent / "tests" / "lightning_modules" / "killed_runs.py"
        done = warm_python.run(program, [str(made[job]), ",".join(["whole", *KILLS]), *files])
        assert done.returncode == 0, done.stderr
    return made


def run_directory(runs: dict[str, Path], job: str, name: str) -> Path:
    return runs[job] / name.replace(" ", "_") / "runs" / NAME[job] / "version_0"


def last_checkpoint(runs: dict[str, Path], job: str, name: str) -> dict[str, Any]:
    files = sorted((run_directory(runs, job, name) / "checkpoints").glob("step_*.ckpt"))
    assert files[-1].name == f"step_{STOPPED:06d}.ckpt"
    return read_checkpoint(files[-1])


def rows(runs: dict[str, Path], job: str, name: str) -> list[dict[str, str]]:
    with (run_directory(runs, job, name) / "metrics.csv").open(newline="") as file:
        return [
            {column: value for column, value in row.items() if value and not column.startswith("perf/")}
            for row in csv.DictReader(file)
        ]


@both
def test_the_uninterrupted_run_stops_early_with_an_average(runs: dict[str, Path], job: str) -> None:
    saved = last_checkpoint(runs, job, "whole")
    assert saved["global_step"] == STOPPED
    assert saved["averaging_state"] == {"updates": STOPPED, "step": STOPPED}
    assert any(row.get({"meta": "lr-Adam", "text": "lr-AdamW/pg2"}[job]) for row in rows(runs, job, "whole"))


@both
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_as_the_uninterrupted_one(runs: dict[str, Path], job: str, name: str) -> None:
    said = (runs[job] / name.replace(" ", "_") / "log.txt").read_text()
    statuses = json.loads((runs[job] / name.replace(" ", "_") / "statuses.json").read_text())
    assert statuses == [*[-9] * (len(statuses) - 1), 0], said
    assert len(statuses) > 1
    whole, resumed = (last_checkpoint(runs, job, each) for each in ("whole", name))
    for part in ("state_dict", "current_model_state"):
        assert whole[part].keys() == resumed[part].keys()
        for key, value in whole[part].items():
            assert value.equal(resumed[part][key]), (part, key)
    assert whole["averaging_state"] == resumed["averaging_state"]
    stopping = next(key for key in whole["callbacks"] if "EarlyStopping" in key)
    assert str(whole["callbacks"][stopping]) == str(resumed["callbacks"][stopping])
    assert rows(runs, job, name) == rows(runs, job, "whole")
