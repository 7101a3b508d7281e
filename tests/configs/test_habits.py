"""Every habit of the Lightning ecosystem runs from its overlay, for both jobs, and does what it says."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import device_stats_monitor
from lightning.pytorch.loggers import wandb as lightning_wandb
from lightning_utilities.core.imports import RequirementCache
from small_jobs import (
    CONFIGS,
    checkpoint,
    column,
    fit_arguments,
    run_directory,
    steps_saved,
    write_jobs,
)

from callbacks import ResumableWeightAveraging
from lightning_modules.checkpoint_io import read_checkpoint
from lightning_modules.cli import main
from lightning_modules.memory_lm import MemoryLM
from theria.models.flops import training_flops_per_token

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
    # what a test provokes
    pytest.mark.filterwarnings("ignore:training goes back from step:UserWarning"),
    # a resume with more or fewer callbacks
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

both = pytest.mark.parametrize("job", ["meta", "text"])


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the small jobs and their text stand."""
    directory = tmp_path_factory.mktemp("jobs")
    write_jobs(directory)
    return directory


@pytest.fixture(scope="module")
def made(jobs: Path) -> dict[str, Path]:
    """Directories in which each job has run, five steps as it is and six with an average of weights."""
    directories = {"plain": jobs / "plain", "averaged": jobs / "averaged"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["theria"])
        for name, options in (
            ("plain", ["--trainer.max_steps=5"]),
            ("averaged", ["weight_averaging", "--trainer.max_steps=6"]),
        ):
            directories[name].mkdir()
            patch.chdir(directories[name])
            for job in ("meta", "text"):
                main(fit_arguments(jobs, job, *options))
    return directories


@pytest.fixture
def plain(made: dict[str, Path], _place: None) -> None:
    """Version 0 of each job is its plain run."""
    shutil.copytree(made["plain"], ".", dirs_exist_ok=True)


@pytest.fixture
def with_average(made: dict[str, Path], _place: None) -> None:
    """Version 0 of each job is its run with an average."""
    shutil.copytree(made["averaged"], ".", dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["theria"])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("theria: error: "))
    return line


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


class NotANumber(Callback):
    """Spoils a gradient of step 4, the first time that it comes."""

    step = 4

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.step = -1
            parameter = next(pl_module.parameters())
            self.hook = parameter.register_hook(lambda gradient: gradient * torch.nan)

    def on_train_batch_end(self, *_: Any) -> None:
        if hasattr(self, "hook"):
            self.hook.remove()


class Interruption(Callback):
    """Ctrl-C inside the validation after step 2."""

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise KeyboardInterrupt


# --- early stopping


def test_early_stopping_stays_stopped_until_it_gets_more_patience(jobs: Path) -> None:
    job = "meta"
    strict = ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=10"]
    main(fit_arguments(jobs, job, "early_stopping_meta_seqcls", *strict, "--trainer.max_steps=20"))
    assert steps_saved(job)[-1] == 4  # validated at 2, the best so far, and at 4, no better by 10
    resumed = ["fit", "--ckpt_path", str(run_directory(job))]
    main(resumed)
    assert steps_saved(job)[-1] == 4
    main([*resumed, "--trainer.callbacks.patience=3"])
    assert steps_saved(job)[-1] == 8


def test_early_stopping_names_what_there_is_to_monitor(
    jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["early_stopping_meta_seqcls", "--trainer.callbacks.monitor=val/lost"]
    assert "'val/lost', which validation did not log" in refused(capsys, fit_arguments(jobs, "meta", *wrong))


# --- learning rates


@both
def test_the_learning_rate_monitor_shows_the_schedule_also_while_a_rollback_lowers_rates(
    jobs: Path, job: str, plain: None
) -> None:
    healer = {"every_n_steps": 2, "healthy_after": 1, "skip_window": 0, "cool_down": 9, "lr_factor": 0.25}
    callbacks = [
        {"class_path": "PPLDeltaRollback", "init_args": healer},
        {"class_path": f"{__name__}.NotANumber"},
    ]
    main(fit_arguments(jobs, job, f"--trainer.callbacks={json.dumps(callbacks)}", "learning_rate_monitor"))
    scheduled = column(job, "train/learning_rate")[:4]
    assert len(set(scheduled)) == {"meta": 1, "text": 3}[job]
    for tag in {"meta": ["lr-Adam"], "text": ["lr-AdamW/pg1", "lr-AdamW/pg2"]}[job]:
        assert column(job, tag, version=1) == [*scheduled, *scheduled[2:]]  # from step 2 on twice
    used = [*scheduled, *(rate * 0.25 for rate in scheduled[2:])]
    assert column(job, "train/learning_rate", version=1) == pytest.approx(used)


def test_the_search_suggests_a_rate_and_trains_nothing(jobs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), caplog.at_level("INFO", "lightning.pytorch"):
        main(fit_arguments(jobs, "text", "learning_rate_search", "--trainer.callbacks.num_training_steps=30"))
    (said,) = (text for text in caplog.messages if text.startswith("suggested learning rate"))
    found = re.search(r"--model.init_args.optimizer.init_args.lr ([\d.e+-]+),", said)
    assert found is not None
    with (run_directory("text") / "learning_rate_search.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows[0]["learning_rate"] == pytest.approx(1e-6)
    assert len(rows) == 30
    assert float(found[1]) in [pytest.approx(row["learning_rate"], rel=1e-2) for row in rows]
    # the steepest fall of the smoothed loss by rate, leaving out ten first steps and the last one
    rates, losses = (torch.tensor([row[name] for row in rows[10:-1]]) for name in rows[0])
    steepest = torch.gradient(losses, spacing=(rates,))[0].argmin()
    assert float(found[1]) == pytest.approx(float(rates[steepest]), rel=1e-2)
    assert (run_directory("text") / "learning_rate_search.png").stat().st_size > 5000
    assert not (run_directory("text") / "checkpoints").exists()
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_the_search_is_refused_where_it_cannot_work(
    jobs: Path, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, fit_arguments(jobs, "meta", "learning_rate_search"))
    assert "LearningRateSearch cannot search for MetaSeqClassifier" in line
    assert "--model.init_args.optimizer.init_args.lr" in line
    resumed = fit_arguments(jobs, "text", "learning_rate_search", f"--ckpt_path={run_directory('text')}")
    assert "leave ckpt_path out" in refused(capsys, resumed)


# --- what is measured


@both
def test_device_stats(jobs: Path, job: str) -> None:
    pytest.importorskip("psutil")
    main(fit_arguments(jobs, job, "device_stats"))
    used = column(job, "DeviceStatsMonitor.on_train_batch_start/cpu_vm_percent")
    assert len(used) == 4
    assert all(0 < percent <= 100 for percent in used)


def test_a_missing_package_is_named_with_its_extra(
    jobs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_stats_monitor, "_PSUTIL_AVAILABLE", RequirementCache("psutil>=9999"))
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", RequirementCache("wandb>=9999"))
    for overlay, package, extra in (("device_stats", "psutil", "monitor"), ("wandb", "wandb", "wandb")):
        line = refused(capsys, fit_arguments(jobs, "meta", overlay))
        assert line == f"theria: error: {package} is not installed: pip install 'theria[{extra}]'"


@both
def test_rates_profile_summary_and_mfu(
    jobs: Path, job: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    peak = {"meta": [], "text": ["--model.init_args.peak_tflops=0.5"]}[job]
    overlays = ["model_summary", "--trainer.enable_model_summary=true", "profiler_simple", "throughput"]
    with caplog.at_level("INFO"), caplog.at_level("INFO", "lightning.pytorch"):
        main(fit_arguments(jobs, job, *overlays, "--trainer.callbacks.window_size=2", *peak))
    assert "perf/mfu is left out" not in caplog.text
    assert {"meta": "model.q_proj", "text": "model.blocks.0"}[job] in capsys.readouterr().out

    per_batch = {"meta": 2, "text": 4}[job]
    assert column(job, "train/samples") == [per_batch * step for step in range(1, 5)]
    batches, samples = (column(job, f"train/device/{name}_per_sec") for name in ("batches", "samples"))
    assert len(batches) >= 2
    assert samples == pytest.approx([per_batch * rate for rate in batches])
    assert column(job, "validate/device/samples_per_sec")

    table = (run_directory(job) / "fit-profile.txt").read_text()
    assert "Total time (s)" in table
    assert re.search(r"\.training_step\s*\|[^|]*\|\s*4\s*\|", table)

    if job == "text":
        sizes = {"width": 16, "heads": 2, "window": 6, "memory_dim": 8, "slots": 4, "chunk_size": 8}
        operations = training_flops_per_token(MemoryLM(**sizes).model, 40)
        rates = column(job, "perf/tokens_per_second")
        assert column(job, "perf/mfu") == pytest.approx([operations * rate / 0.5e12 for rate in rates])


def test_mfu_is_left_out_with_a_line_where_no_peak_is_known(
    jobs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), caplog.at_level("INFO", "lightning.pytorch"):
        main(fit_arguments(jobs, "text", "--trainer.max_steps=1"))
    assert "perf/mfu is left out: no peak of this cpu in 32-true is known" in caplog.text
    assert column("text", "perf/tokens_per_second")
    assert not column("text", "perf/mfu")


@both
def test_the_pytorch_profiler_writes_a_trace(jobs: Path, job: str) -> None:
    fewer = ["--trainer.max_steps=6", "--trainer.limit_val_batches=0"]
    fewer += ["--model.init_args.blocks=1"] if job == "text" else []
    main(fit_arguments(jobs, job, "profiler_pytorch", *fewer))
    (trace,) = run_directory(job).glob("fit-profile-*.training_step.*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "ProfilerStep#3" in names
    assert any(str(name).startswith("aten::") for name in names)
    assert "aten::" in (run_directory(job) / "fit-profile.txt").read_text()


# --- how it is trained


@both
def test_gradient_clipping_bounds_the_step(jobs: Path, job: str, plain: None) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0, "weight_decay": 0.0}}
    sgd = [f"--model.init_args.optimizer={json.dumps(optimizer)}", "--model.init_args.lr_scheduler=null"]
    clip = {
        "meta": ["gradient_clipping_meta_seqcls", "--model.init_args.gradient_clip_val=0.001"],
        "text": ["--trainer.gradient_clip_val=0.001"],
    }[job]
    main(fit_arguments(jobs, job, *clip, *sgd, "--trainer.max_steps=1"))
    beginning = run_directory(job, 1) / "checkpoints" / "rollback_000000.ckpt"
    start, end = read_checkpoint(beginning)["state_dict"], checkpoint(job, 1, 1)["state_dict"]
    moved = [(end[name] - value).flatten() for name, value in start.items() if name.startswith("model.")]
    assert float(torch.cat(moved).norm()) == pytest.approx(0.001, rel=1e-3)
    # norms that are logged are those before
    norm = {"meta": "train/grad_norm_q_proj", "text": "train/grad_norm"}[job]
    assert column(job, norm, 1)[0] == column(job, norm)[0] > 0.001


def test_clipping_by_the_trainer_is_refused_with_the_setting_that_clips(
    jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, fit_arguments(jobs, "meta", "--trainer.gradient_clip_val=1"))
    assert line.endswith("set model.init_args.gradient_clip_val instead")


@both
def test_bf16_mixed(jobs: Path, job: str, plain: None) -> None:
    main(fit_arguments(jobs, job, "bf16_mixed"))
    full, mixed = (checkpoint(job, 4, version)["state_dict"] for version in range(2))
    assert not same(full, mixed)
    for name, value in mixed.items():
        assert value.dtype == full[name].dtype
        assert torch.isfinite(value).all()
    losses = [column(job, "train/loss", version)[0] for version in range(2)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@both
def test_deterministic(jobs: Path, job: str, plain: None) -> None:
    main(fit_arguments(jobs, job, "deterministic"))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert same(*(checkpoint(job, 4, version)["state_dict"] for version in range(2)))


# --- averaging of weights


def averaged(states: list[dict[str, torch.Tensor]], decay: float | None) -> dict[str, torch.Tensor]:
    """In float64, step by step."""
    average = {name: value.double() for name, value in states[0].items()}
    for count, state in enumerate(states[1:], start=1):
        keep = count / (count + 1) if decay is None else decay
        average = {name: keep * value + (1 - keep) * state[name].double() for name, value in average.items()}
    return average


@both
@pytest.mark.parametrize(("decay", "start", "every"), [("0.6", 0, 1), ("null", 1, 2)])
def test_a_checkpoint_has_the_average_and_the_weights_in_training(
    jobs: Path, job: str, decay: str, start: int, every: int, plain: None
) -> None:
    options = [f"--trainer.callbacks.decay={decay}", f"--trainer.callbacks.start_step={start}"]
    options += [f"--trainer.callbacks.every_n_steps={every}", "--trainer.max_steps=5"]
    main(fit_arguments(jobs, job, "weight_averaging", *options))
    weights = {step: checkpoint(job, step)["state_dict"] for step in range(1, 6)}
    for step in range(1, 6):
        saved = checkpoint(job, step, version=1)
        assert same(saved["current_model_state"], weights[step])  # training goes on as without
        taken = [weights[s] for s in range(start + every, step + 1, every)] or [weights[step]]
        expected = averaged(taken, None if decay == "null" else float(decay))
        for name, value in saved["state_dict"].items():
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(value, weights[step][name]), name  # counters are not averaged


@both
def test_validation_and_evaluation_see_the_average(
    made: dict[str, Path], job: str, with_average: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = {"meta": "val/query_loss", "text": "val/bits_per_byte"}[job]
    main(["validate", "--ckpt_path", str(run_directory(job))])
    with (run_directory(job) / "validate_0" / "metrics.csv").open(newline="") as file:
        (evaluated,) = (float(row[metric]) for row in csv.DictReader(file))
    seen = column(job, metric)
    assert evaluated == pytest.approx(seen[-1], rel=1e-6)
    monkeypatch.chdir(made["plain"])
    assert column(job, metric)[1] != seen[1]  # of the weights in training


@both
def test_a_rollback_sets_the_average_back(jobs: Path, job: str, with_average: None) -> None:
    spoiler = f"--trainer.callbacks+={__name__}.NotANumber"
    main(fit_arguments(jobs, job, spoiler, "weight_averaging", "--trainer.max_steps=6"))
    undisturbed, healed = (checkpoint(job, 6, version) for version in range(2))
    assert column(job, "rollback/to_step", version=1) == [2.0]
    for name in ("state_dict", "current_model_state"):
        assert same(undisturbed[name], healed[name]), name
    assert undisturbed["averaging_state"] == healed["averaging_state"] == {"updates": 6, "step": 6}


@both
def test_an_interrupted_validation_saves_the_weights_in_training(
    jobs: Path, job: str, with_average: None
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            main(
                fit_arguments(jobs, job, "weight_averaging", f"--trainer.callbacks+={__name__}.Interruption")
            )
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert steps_saved(job, version=1)[-1] == 2
    main(fit_arguments(jobs, job, "weight_averaging", f"--ckpt_path={run_directory(job, 1)}"))
    for step in (2, 4):
        whole, interrupted = (checkpoint(job, step, version) for version in range(2))
        for name in ("state_dict", "current_model_state"):
            assert same(whole[name], interrupted[name]), (step, name)


def test_averaging_begins_anew_from_a_checkpoint_without(jobs: Path, plain: None) -> None:
    resumed = [f"--ckpt_path={run_directory('meta')}", "--trainer.max_steps=6"]
    with pytest.warns(UserWarning, match="no average of weights: one begins with the next update"):
        main(fit_arguments(jobs, "meta", "weight_averaging", *resumed))
    saved = checkpoint("meta", 6)
    assert same(saved["state_dict"], saved["current_model_state"])
    assert saved["averaging_state"] == {"updates": 1, "step": 6}


def test_averaging_and_divided_parameters_are_refused(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, fit_arguments(jobs, "text", "fsdp", "weight_averaging"))
    assert "ResumableWeightAveraging reads whole parameters" in line
    assert line.endswith("leave the callback out, or set trainer.strategy to ddp")


def test_averaging_refuses_impossible_values() -> None:
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"start_step": -1}, {"every_n_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ResumableWeightAveraging(**options)  # type: ignore[arg-type]


# jsonargparse cannot write down the default device of stochastic weight averaging
@pytest.mark.filterwarnings("ignore::jsonargparse._util.JsonargparseWarning")
@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (["EarlyStopping", "--trainer.callbacks.monitor=val/query_loss"], "ResumableEarlyStopping"),
        (["EMAWeightAveraging"], "ResumableWeightAveraging"),
        (["StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"], "ResumableWeightAveraging"),
        (["LearningRateFinder"], "LearningRateSearch"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_would_go_wrong_without_a_word_is_refused(
    jobs: Path, capsys: pytest.CaptureFixture[str], given: list[str], instead: str
) -> None:
    line = refused(capsys, fit_arguments(jobs, "meta", f"--trainer.callbacks+={given[0]}", *given[1:]))
    assert line.endswith(f": take {instead}")
    assert not Path("runs").exists()


# --- where it runs


@both
def test_wandb_offline_goes_on_in_its_run(jobs: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    main(fit_arguments(jobs, job, "wandb", "--trainer.max_steps=2"))
    wandb.finish()
    name = (run_directory(job) / "wandb_id").read_text()
    main(["fit", "--ckpt_path", str(run_directory(job)), "--trainer.max_steps=4"])
    wandb.finish()
    files = list((run_directory(job) / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert files
    assert all(path.stat().st_size for path in files)


def test_the_slurm_script_goes_on_until_it_is_done(
    jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins: srun runs what it is given, theria leaves a checkpoint, scontrol notes its order."""
    programs = tmp_path / "bin"
    programs.mkdir()
    place = "runs/slurm_7/version_0/checkpoints"
    leave = f"mkdir -p {place}; touch {place}/step_000004.ckpt"
    for name, body in {
        "srun": 'exec "$@"',
        "scontrol": 'echo "$@" >> scontrol.txt',
        "theria": f'echo "$@" >> theria.txt; case "$*" in *stop*) exit 143;; esac; {leave}',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}

    def submit(*arguments: str) -> int:
        command = ["bash", str(CONFIGS / "slurm" / "fit.sbatch"), *arguments]
        return subprocess.run(command, env=environment, timeout=60, check=False).returncode

    assert submit("--name", "stop") == 143
    assert Path("scontrol.txt").read_text() == "requeue 7\n"
    assert submit(*fit_arguments(jobs, "meta")[1:]) == 0
    begun = Path("theria.txt").read_text().splitlines()[-1].split()
    with pytest.raises(SystemExit) as left:
        main([*begun, "--print_config"])  # the application understands what it was given
    assert left.value.code == 0
    assert "name: slurm_7" in capsys.readouterr().out
    assert submit() == 0
    assert Path("theria.txt").read_text().splitlines()[-1] == "fit --ckpt_path runs/slurm_7/version_0"
    assert Path("scontrol.txt").read_text() == "requeue 7\n"
    assert "Untested on a cluster" in (CONFIGS / "slurm" / "fit.sbatch").read_text()
