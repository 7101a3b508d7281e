"""The command line `theria`: fit, validate and test from a configuration, and resume from a run directory."""

import argparse
import logging
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

import callbacks
import datamodules
import lightning_modules
from callbacks import ConfiguredOptimizerValues, UnhealthyGatesError, UnhealthyTrainingError
from lightning_modules import wandb_logger
from lightning_modules.atomic_file import atomic_file
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.cli_checks import check_agreement, check_callbacks, check_settings, check_shapes
from lightning_modules.cli_errors import OneLineParser, fail, is_about_settings, is_about_the_disk
from lightning_modules.loggers import RunLogger
from lightning_modules.run_directory import (
    CONFIG_NAME,
    METRICS,
    Restart,
    ResumeError,
    checkpoint_files,
    config_beside,
    find_restart,
    open_run_directory,
)

# A configuration names these packages' classes without a path, because they are imported here.
_NAMED_IN_CONFIGURATIONS = (callbacks, datamodules, lightning_modules, wandb_logger)


def main(args: list[str] | None = None) -> None:
    """Run the command line; None stands for the arguments of the process."""
    _silence_third_parties()
    try:
        TheriaCLI(args=sys.argv[1:] if args is None else args)
    except Exception as error:
        if is_about_the_disk(error) or is_about_settings(error):
            fail(str(error))
        raise


class SaveRunConfig(SaveConfigCallback):
    """Writes the configuration into the run directory; an earlier one that differs is kept beside it."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml`, on rank zero only."""
        logger = next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
        if logger is None or logger.directory is None:
            return
        config = self.config.clone()
        config["ckpt_path"] = None  # what starts from this file is a new run
        content = self.parser.dump(config, skip_none=False).encode()
        path = logger.directory / CONFIG_NAME
        if path.exists() and path.read_bytes() != content:
            with atomic_file(
                path.with_name(f"config_until_step_{logger.resumed_step or 0:06d}.yaml")
            ) as file:
                file.write(path.read_bytes())
        with atomic_file(path) as file:
            file.write(content)


class TheriaCLI(LightningCLI):
    """LightningCLI in subclass mode, in which the configuration decides and a checkpoint only restores.

    Beyond Lightning's it has run directories that are resumed by name, atomic checkpoints and errors of
    one line.
    """

    run_directory: Path | None = None
    restart: Restart | None = None
    _figures_wanted = False

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            trainer_defaults={
                "logger": [{"class_path": name} for name in ("RunTensorBoardLogger", "RunCSVLogger")],
                "callbacks": [ConfiguredOptimizerValues()],
            },
            seed_everything_default=0,
            parser_kwargs={"prog": "theria", "default_env": True, "env_prefix": "THERIA"},
            parser_class=OneLineParser,
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without predict, which no module here implements."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where runs go."""
        parser.add_argument("--save_dir", type=str, default="runs", help="Directory of all runs.")
        parser.add_argument(
            "--name",
            type=str,
            default="theria",
            help="A new run gets the directory <save_dir>/<name>/version_N.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with the configuration of a named run directory where none is given."""
        if isinstance(args, list):
            args = _with_config_of_run(args, self.subcommands())
            self.config = parser.parse_args(args)
        else:
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's hyper-parameters override the configuration."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to start from before anything is built."""
        config = self.config[self.subcommand]
        if config.get("ckpt_path"):
            try:
                self.restart = find_restart(config["ckpt_path"])
            except ResumeError as error:
                fail(str(error))
            config["ckpt_path"] = str(self.restart.checkpoint)

    def instantiate_classes(self) -> None:
        """Build everything; a constructor that refuses its values ends the program with the reason."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            fail(str(error))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with atomic checkpoints unless the configuration brings another CheckpointIO."""
        config = self._get(self.config_init, "trainer")
        if config.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
            fail(f"trainer.accelerator is {config['accelerator']}, but no GPU is usable: take cpu or auto")
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    def after_instantiate_classes(self) -> None:
        """Check what only shows once everything is built, then open the run directory."""
        check_settings(self.model, self.trainer)
        check_callbacks(self.trainer)
        check_agreement(self.model, self.datamodule)
        if self.trainer.precision == "64-true":
            # Lightning restores before it converts, which would round a checkpoint's weights to single
            self.model.double()
        if self.restart is not None:
            check_shapes(self.model, self.restart)
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, RunLogger)]
        if not loggers:
            return
        subcommand = str(self.subcommand)
        config = self.config[subcommand]
        try:
            self.run_directory = open_run_directory(
                subcommand, config["save_dir"], config["name"], self.restart
            )
        except ResumeError as error:
            fail(str(error))
        in_place = subcommand == "fit" and self.restart is not None and self.restart.in_place
        for logger in loggers:
            logger.bind(self.run_directory, self.restart.step if in_place and self.restart else None)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; settings and training that are wrong end in one line, a fault in the code in its traceback."""
        if self.run_directory is not None:
            _say(f"Run directory: {self.run_directory}")
        if self.restart is not None:
            _say(f"Starting from {self.restart.checkpoint}, after step {self.restart.step}")
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if is_about_settings(error):
                fail(str(error))
            self._say_where_all_is()
            if isinstance(error, (UnhealthyTrainingError, UnhealthyGatesError)):
                fail(str(error), status=1)
            if is_about_the_disk(error):
                fail(f"nothing can be written any more: {error}", status=1)
            raise
        except SystemExit as interruption:
            self._say_where_all_is()
            if isinstance(interruption, SIGTERMException):
                # Lightning leaves with status 0, as if the run had ended by itself.
                raise SystemExit(128 + signal.SIGTERM) from interruption
            raise
        self._say_where_all_is()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lightning's, without its table, which repeats all figures once a loader and cuts their names."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        self._figures_wanted = bool(arguments.get("verbose"))
        return arguments | {name: False for name in ("verbose",) if name in arguments}

    def after_validate(self) -> None:
        """Print every figure once."""
        self._say_figures()

    def after_test(self) -> None:
        """Print every figure once."""
        self._say_figures()

    def _say_figures(self) -> None:
        if not self._figures_wanted:
            return
        figures = self.trainer.callback_metrics
        width = max(map(len, figures), default=0)
        _say("\n".join(f"{name:<{width}}  {float(figures[name]):.6g}" for name in sorted(figures)))

    def _say_where_all_is(self) -> None:
        if self.subcommand != "fit" or self.run_directory is None:
            return
        run = self.run_directory
        lines = [("Run directory", str(run))]
        lines += [("Metrics", str(run / name)) for name in METRICS if (run / name).exists()]
        if checkpoints := checkpoint_files(run):
            lines.append(("Checkpoint", str(checkpoints[0])))
        if best := getattr(self.trainer.checkpoint_callback, "best_model_path", ""):
            lines.append(("Best", best))
        lines.append(("Look at it", f"tensorboard --logdir {shlex.quote(str(run.parent))}"))
        if checkpoints:
            done = self.trainer.global_step >= self.trainer.max_steps != -1
            further = f" --trainer.max_steps {2 * self.trainer.max_steps}" if done else ""
            lines.append(("Test it", f"theria test --ckpt_path {shlex.quote(str(run))}"))
            lines.append(("Go on", f"theria fit --ckpt_path {shlex.quote(str(run))}{further}"))
        _say("\n".join(f"{title:<14}{text}" for title, text in lines))


def _with_config_of_run(args: list[str], subcommands: dict[str, set[str]]) -> list[str]:
    """Insert `--config RUN_DIR/config.yaml` where `--ckpt_path` is given and `--config` is not."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--ckpt_path", nargs="?")
    known.add_argument("-c", "--config", nargs="?", action="append")
    given, _ = known.parse_known_args(args)
    if given.ckpt_path is None or given.config is not None:
        return args
    if not Path(given.ckpt_path).exists():
        fail(f"nothing to start from: there is no {given.ckpt_path}")
    config = config_beside(given.ckpt_path)
    subcommand = next((index for index, arg in enumerate(args) if arg in subcommands), None)
    if config is None or subcommand is None:
        return args
    return [*args[: subcommand + 1], "--config", str(config), *args[subcommand + 1 :]]


def _silence_third_parties() -> None:
    # An advertisement, a deprecation inside Lightning that its user can do nothing about, a remark on how the
    # model summary counts the bytes of a precision that it does not know, and one on what would happen if the
    # states that blocks return were changed in place, which nothing does.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*is not supported by the model summary.*")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
