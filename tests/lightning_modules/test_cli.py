"""The command line as a user meets it: what a run leaves, what counts on resume, how wrong input ends."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from small_jobs import fit_arguments, write_jobs

from callbacks import read_metrics
from lightning_modules import cli
from lightning_modules.checkpoint_io import AtomicCheckpointIO, check_primitive, read_checkpoint
from lightning_modules.cli import TheriaCLI, main

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # Lightning's cli.py calls jsonargparse by names that are going away
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # four sequences need no workers, and a machine with a GPU may test the CPU
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]

CONFIG = Path(__file__).parents[2] / "configs" / "meta_seqcls.yaml"
SMALL: dict[str, Any] = {
    "model": {"init_args": {"width": 6, "num_classes": 2, "inner_steps": 1}},
    "data": {
        "init_args": {
            "length": 5,
            "width": 6,
            "num_classes": 2,
            "num_signal_positions": 2,
            "support_size": 3,
            "query_size": 3,
            "meta_batch_size": 2,
            "train_tasks_per_epoch": 14,
            "val_tasks": 4,
            "test_tasks": 4,
        }
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 6,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [
            {"class_path": "RNGState"},
            {"class_path": "MetricsJSONL"},
            {"class_path": "ResumableCheckpoint", "init_args": {"every_n_steps": 3}},
        ],
    },
}


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.setattr("sys.argv", ["theria"])


def theria(subcommand: str, *args: str, small: bool = True) -> None:
    configs = ["--config", str(CONFIG), "--config", "small.yaml"] if small else []
    main([subcommand, *configs, *args])


def refused(capsys: pytest.CaptureFixture[str], *args: str, small: bool = True) -> str:
    """The one line with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        theria(*args, small=small)
    assert left.value.code not in (0, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("theria: error: ")
    return lines[0]


RUN = Path("runs", "meta_seqcls", "version_0")


def rows() -> list[dict[str, str]]:
    with (RUN / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rates(run: Path = RUN) -> list[float]:
    return read_metrics(run / "metrics.jsonl")["learning_rate"].tolist()


def test_a_run_leaves_everything_in_its_directory(capsys: pytest.CaptureFixture[str]) -> None:
    theria("fit")
    names = {path.name.split(".")[0] for path in RUN.iterdir()}
    assert {"checkpoints", "config", "events", "metrics"} <= names
    assert [path.name for path in sorted((RUN / "checkpoints").iterdir())] == [
        "step_000003.ckpt",
        "step_000006.ckpt",
    ]
    assert len(read_metrics(RUN / "metrics.jsonl")) == 6
    assert len(read_metrics(RUN / "metrics.jsonl", "validation")) == 3
    assert sum(bool(row["val/query_accuracy"]) for row in rows()) == 3
    said = capsys.readouterr().out
    for line in (
        f"Checkpoint    {RUN}/checkpoints/step_000006.ckpt",
        f"Metrics       {RUN}/metrics.csv",
        "Look at it    tensorboard --logdir runs/meta_seqcls",
        f"Go on         theria fit --ckpt_path {RUN} --trainer.max_steps 12",
    ):
        assert line in said.splitlines()


def test_the_commands_it_suggests_work(capsys: pytest.CaptureFixture[str]) -> None:
    theria("fit")
    suggested = [
        line.split("theria ")[1] for line in capsys.readouterr().out.splitlines() if "theria " in line
    ]
    assert [command.split()[0] for command in suggested] == ["test", "fit"]
    for command in suggested:
        main(command.split())
    assert (RUN / "test_0").is_dir()
    assert len(read_metrics(RUN / "metrics.jsonl")) == 12


def test_each_run_gets_a_directory_of_its_own() -> None:
    theria("fit", "--trainer.max_steps", "1")
    theria("fit", "--trainer.max_steps", "1", "--name", "other", "--save_dir", "elsewhere")
    theria("fit", "--trainer.max_steps", "1")
    assert sorted(str(path.parent) for path in Path().rglob("config.yaml")) == [
        "elsewhere/other/version_0",
        "runs/meta_seqcls/version_0",
        "runs/meta_seqcls/version_1",
    ]


def test_a_checkpoint_of_the_real_run_holds_tensors_and_primitives() -> None:
    theria("fit", "--trainer.max_steps", "1")
    content = torch.load(next(RUN.rglob("*.ckpt")), weights_only=True)
    check_primitive(content)
    assert content["hyper_parameters"]["inner_steps"] == 1


def test_no_option_needs_more_than_the_run_to_go_on() -> None:
    theria("fit", "--trainer.max_steps", "4")
    main(["fit", "--ckpt_path", str(RUN), "--trainer.max_steps", "6"])
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    steps = [int(row["step"]) for row in rows() if row["train/loss"]]
    assert steps == list(range(6))
    assert [int(row["step"]) for row in rows() if row["val/query_accuracy"]] == [1, 3, 5]
    assert read_metrics(RUN / "metrics.jsonl")["step"].tolist() == list(range(1, 7))


def test_going_on_equals_never_having_stopped() -> None:
    theria("fit", "--name", "whole")
    theria("fit", "--trainer.max_steps", "4")
    main(["fit", "--ckpt_path", str(RUN), "--trainer.max_steps", "6"])
    whole, parts = (
        read_checkpoint(Path("runs", name, "version_0", "checkpoints", "step_000006.ckpt"))
        for name in ("whole", "meta_seqcls")
    )
    for name, value in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], value), name
    assert repr(parts["optimizer_states"]) == repr(whole["optimizer_states"])
    assert parts["loops"]["fit_loop"] == whole["loops"]["fit_loop"]


def test_a_file_starts_a_new_run_from_its_state() -> None:
    theria("fit")
    theria("fit", "--ckpt_path", str(RUN / "checkpoints" / "step_000003.ckpt"))
    other = RUN.with_name("version_1")
    assert read_metrics(other / "metrics.jsonl")["step"].tolist() == [4, 5, 6]
    first, second = (read_checkpoint(run / "checkpoints" / "step_000006.ckpt") for run in (RUN, other))
    for name, value in first["state_dict"].items():
        assert torch.equal(second["state_dict"][name], value), name


# the data say themselves that their settings changed
@pytest.mark.filterwarnings("ignore:The checkpoint was trained with:UserWarning")
def test_the_configuration_beats_the_checkpoint() -> None:
    """Settings of the model and the data, and the optimiser's values, are those given now."""
    theria("fit", "--trainer.max_steps", "3")
    theria(
        "fit",
        *("--ckpt_path", str(RUN)),
        *("--model.init_args.mode", "FO", "--model.init_args.inner_lr", "0.25"),
        *("--model.init_args.optimizer.init_args.lr", "0.0625"),
        *("--data.init_args.val_tasks", "6"),
    )
    assert rates() == [0.001] * 3 + [0.0625] * 3
    content = read_checkpoint(RUN / "checkpoints" / "step_000006.ckpt")
    assert content["hyper_parameters"]["mode"] == "FO"
    assert content["hyper_parameters"]["inner_lr"] == 0.25
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["model"]["init_args"]["mode"] == "FO"
    assert config["data"]["init_args"]["val_tasks"] == 6
    before = yaml.safe_load((RUN / "config_until_step_000003.yaml").read_text())
    assert before["model"]["init_args"]["mode"] == "FULL"


@pytest.mark.parametrize("change", [["torch.optim.SGD"], ["torch.optim.Adam", "--A.amsgrad=true"]])
def test_another_optimiser_does_not_take_this_ones_state(
    change: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    theria("fit", "--trainer.max_steps=3")
    optimizer, *rest = change
    arguments = [argument.replace("A.", "model.init_args.optimizer.init_args.") for argument in rest]
    with pytest.raises(SystemExit) as end:
        theria(
            "fit",
            "--ckpt_path=runs/meta_seqcls/version_0",
            f"--model.init_args.optimizer={optimizer}",
            *arguments,
        )
    assert end.value.code == 2
    assert "its saved state does not fit" in capsys.readouterr().err


def test_double_precision_is_restored_as_it_was_saved() -> None:
    theria("fit", "--trainer.precision=64-true", "--trainer.max_steps=6", "--name=whole")
    theria("fit", "--trainer.precision=64-true", "--trainer.max_steps=3", "--name=parts")
    theria("fit", "--ckpt_path=runs/parts/version_0", "--trainer.precision=64-true", "--trainer.max_steps=6")
    whole, parts = (
        read_checkpoint(Path(f"runs/{name}/version_0/checkpoints/step_000006.ckpt"))["state_dict"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    assert all(weight.dtype is torch.float64 for weight in whole.values())


def test_the_next_resume_takes_the_configuration_of_the_last() -> None:
    theria("fit", "--trainer.max_steps", "2", "--model.init_args.optimizer.init_args.lr", "0.5")
    lr = ("--model.init_args.optimizer.init_args.lr", "0.25")
    main(["fit", "--ckpt_path", str(RUN), "--trainer.max_steps", "4", *lr])
    main(["fit", "--ckpt_path", str(RUN), "--trainer.max_steps", "6"])
    assert rates() == [0.5] * 2 + [0.25] * 4


def test_a_saved_configuration_starts_a_new_run() -> None:
    theria("fit", "--trainer.max_steps", "2")
    main(["fit", "--ckpt_path", str(RUN), "--trainer.max_steps", "4"])
    main(["fit", "--config", str(RUN / "config.yaml"), "--trainer.max_steps", "1"])
    assert read_metrics(RUN.with_name("version_1") / "metrics.jsonl")["step"].tolist() == [1]


def test_validate_and_test_take_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    theria("fit")
    before = {path.name: path.read_bytes() for path in RUN.glob("metrics.*")}
    capsys.readouterr()
    main(["validate", "--ckpt_path", str(RUN)])
    main(["test", "--ckpt_path", str(RUN / "checkpoints" / "step_000003.ckpt")])
    said = capsys.readouterr().out
    assert "val/query_accuracy" in said
    assert "test/query_accuracy_ci95" in said
    assert {path.name for path in RUN.iterdir() if path.is_dir()} == {"checkpoints", "validate_0", "test_0"}
    assert {path.name: path.read_bytes() for path in RUN.glob("metrics.*")} == before


@pytest.mark.parametrize("command", ["validate", "test"])
def test_every_figure_of_several_loaders_is_printed_once_by_its_whole_name(
    command: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = tmp_path_factory.mktemp("jobs")
    write_jobs(jobs)
    main(fit_arguments(jobs, "text", "--trainer.max_steps=1"))
    capsys.readouterr()
    main([command, "--ckpt_path", "runs/memory_lm/version_0"])
    stage = "val" if command == "validate" else "test"
    lines = capsys.readouterr().out.splitlines()
    figures = [line.split() for line in lines if line.startswith(f"{stage}/")]
    names = [name for name, _ in figures]
    assert {f"{stage}/bits_per_byte", f"{stage}/recall_accuracy_memory_off"} <= set(names)
    assert ("test/recall_previous_shard_accuracy_memory_off" in names) == (command == "test")
    assert len(set(names)) == len(names)
    assert all(float(value) >= 0 for _, value in figures)
    main([command, "--ckpt_path", "runs/memory_lm/version_0", "--verbose", "false"])
    assert f"{stage}/" not in capsys.readouterr().out


def test_a_dry_run_leaves_nothing() -> None:
    theria("fit", "--trainer.fast_dev_run", "true")
    assert not Path("runs").exists()


def test_without_loggers_there_is_no_run_directory() -> None:
    theria("fit", "--trainer.logger", "false", "--trainer.callbacks", "[]", "--trainer.max_steps", "1")
    assert not Path("runs").exists()


def test_loggers_are_there_by_default() -> None:
    Path("bare.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "MetaSeqClassifier", **SMALL["model"]},
                "data": {"class_path": "SyntheticSeqCls", **SMALL["data"]},
                "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False}
                | {"log_every_n_steps": 1, "limit_val_batches": 0, "enable_model_summary": False}
                | {"callbacks": [{"class_path": "ResumableCheckpoint"}]},
            }
        )
    )
    main(["fit", "--config", "bare.yaml"])
    names = {path.name.split(".")[0] for path in Path("runs", "theria", "version_0").iterdir()}
    assert names >= {"metrics", "events", "checkpoints", "config"}


def test_environment_gives_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERIA_FIT__TRAINER__MIN_STEPS", "2")
    monkeypatch.setenv("THERIA_FIT__TRAINER__MAX_STEPS", "1")
    theria("fit")
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["trainer"]["min_steps"] == 2
    assert config["trainer"]["max_steps"] == 6  # the file says so


def test_the_default_seed_is_an_integer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", "--print_config"])
    assert left.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed_everything"] == 0


def test_help_explains_the_model_by_its_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", "--model.help", "MetaSeqClassifier"])
    assert left.value.code == 0
    assert "--model.inner_steps" in capsys.readouterr().out


def test_checkpoints_are_written_atomically(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type] = []

    class Look(TheriaCLI):
        def before_fit(self) -> None:
            seen.append(type(self.trainer.strategy.checkpoint_io))

    Look(["fit", "--config", str(CONFIG), "--config", "small.yaml", "--trainer.max_steps", "1"])
    assert seen == [AtomicCheckpointIO]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no GPU is usable: take cpu or auto" in refused(capsys, "fit", "--trainer.accelerator", "gpu")


def test_a_run_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit", "--ckpt_path", "runs/nowhere", small=False)
    assert "there is no runs/nowhere" in message


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'fitt'" in refused(capsys, "fitt", small=False)
    assert "fit.data, fit.model" in refused(capsys, "fit", small=False)


def test_a_broken_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_text("model: {class_path: MetaSeqClassifier\ntrainer: {}")
    assert "Problems parsing config" in refused(capsys, "fit", "--config", "broken.yaml")


def test_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    theria("fit", "--trainer.max_steps", "1")
    width = ["--model.init_args.width", "4", "--data.init_args.width", "4"]
    line = refused(capsys, "fit", "--ckpt_path", str(RUN), *width)
    assert "model.q_proj.weight has the shape (6, 6) in it and (4, 4) as configured" in line


# the data say themselves that their settings changed
@pytest.mark.filterwarnings("ignore:The checkpoint was trained with:UserWarning")
def test_other_data_in_the_middle_of_an_epoch_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    theria("fit", "--trainer.max_steps", "2")
    line = refused(capsys, "fit", "--ckpt_path", str(RUN), "--data.init_args.train_tasks_per_epoch", "16")
    assert "2 batches into an epoch of 14 items" in line


def test_truncated_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    theria("fit")
    first, last = sorted((RUN / "checkpoints").iterdir())
    last.write_bytes(last.read_bytes()[:-100])
    line = refused(capsys, "fit", "--ckpt_path", str(last))
    assert str(last) in line
    assert str(first) in line
    with pytest.warns(UserWarning, match=f"{last} cannot be read.*{first}"):
        main(["fit", "--ckpt_path", str(RUN)])
    assert [int(row["step"]) for row in rows() if row["train/loss"]] == list(range(6))
    assert read_metrics(RUN / "metrics.jsonl")["attempt"].tolist() == [1, 1, 1, 2, 2, 2]
    read_checkpoint(last)
    for path in (first, last):
        path.write_bytes(b"")
    assert "none of the checkpoints" in refused(capsys, "fit", "--ckpt_path", str(RUN))


class Faulty(Callback):
    """A fault of the code, a termination or Ctrl-C after the third step."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 4:
            if self.kind == "fault":
                raise RuntimeError("a fault")
            if self.kind == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_fault_keeps_its_traceback_and_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="a fault"):
        theria("fit", f"--trainer.callbacks+={__name__}.Faulty", "--trainer.callbacks.kind", "fault")
    said = capsys.readouterr().out
    assert f"Go on         theria fit --ckpt_path {RUN}\n" in said


@pytest.mark.parametrize(("kind", "status", "step"), [("terminate", 143, 4), ("interrupt", 1, 3)])
def test_an_interruption_ends_with_its_status(
    capsys: pytest.CaptureFixture[str], kind: str, status: int, step: int
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as left:
            theria("fit", f"--trainer.callbacks+={__name__}.Faulty", "--trainer.callbacks.kind", kind)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert left.value.code == status
    assert f"Checkpoint    {RUN}/checkpoints/step_{step:06d}.ckpt" in capsys.readouterr().out
    main(
        ["fit", "--ckpt_path", str(RUN), "--trainer.callbacks", "[RNGState,MetricsJSONL,ResumableCheckpoint]"]
    )
    assert read_metrics(RUN / "metrics.jsonl")["step"].tolist() == list(range(1, 7))


class NotANumber(Callback):
    """Every gradient has an entry that is no number."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in pl_module.parameters():
            parameter.register_hook(lambda gradient: gradient * torch.nan)


@pytest.mark.filterwarnings("ignore:training goes back from step:UserWarning")
def test_training_that_cannot_be_healed_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    healer = ["--trainer.callbacks", "[RNGState,PPLDeltaRollback,MetricsJSONL,ResumableCheckpoint]"]
    broken = f"--trainer.callbacks+={__name__}.NotANumber"
    with pytest.raises(SystemExit) as left:
        theria("fit", *healer, broken)
    assert left.value.code == 1
    said = capsys.readouterr()
    (line,) = (line for line in said.err.splitlines() if line.startswith("theria: error: "))
    assert "the gradient of step 1 is nan; 3 of at most 3 rollbacks are used up" in line
    assert line.endswith(f"the last healthy checkpoint is {RUN}/checkpoints/rollback_000000.ckpt")
    assert "Traceback" not in said.err
    assert f"Run directory {RUN}\n" in said.out


def test_main_returns_nothing() -> None:
    """A returned object would be the exit status of the entry point."""
    assert (
        cli.main(["fit", "--config", str(CONFIG), "--config", "small.yaml", "--trainer.max_steps", "1"])
        is None
    )
