"""Runs of ``theria fit`` for the scaling benchmark: their settings, their processes and what they leave."""

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from callbacks import read_metrics

ROOT = Path(__file__).parents[1]
_POLL_SECONDS = 0.1
SINGLE = "one device"
# as FSDP trains, which captures none: what its efficiency is measured by on CUDA
UNCAPTURED = "one device, no CUDA graphs"
_STRATEGIES = {SINGLE: "auto", UNCAPTURED: "auto", "ddp": "ddp", "fsdp": "fully_sharded"}


class Job(NamedTuple):
    """A training job, by accelerator where it differs.

    Attributes:
        configs: files that `theria fit` takes.
        batch_key: name of the data's global batch.
        batches: its size on one device.
        strategies: that the module takes.
        model: settings beside the configuration's.
    """

    configs: dict[str, str]
    batch_key: str
    batches: dict[str, int]
    strategies: tuple[str, ...]
    model: dict[str, Any]


JOBS = {
    "MetaSeqClassifier": Job(
        {"cpu": "configs/meta_seqcls.yaml", "cuda": "configs/meta_seqcls.yaml"},
        "meta_batch_size",
        {"cpu": 16, "cuda": 16},
        ("ddp",),
        {},
    ),
    # ranks would draw other dropouts than one device does, and compiling takes half a minute
    "MemoryLM": Job(
        {"cpu": "configs/memory_lm.yaml", "cuda": "configs/memory_lm_60m.yaml"},
        "batch_size",
        {"cpu": 8, "cuda": 32},
        ("ddp", "fsdp"),
        {"dropout": 0.0, "compile": False},
    ),
}


class Case(NamedTuple):
    """One training run: the module, how it is spread, and whether the batch is divided or grows."""

    module: str
    strategy: str
    devices: int
    weak: bool = False

    def batch(self, accelerator: str) -> int:
        """The global batch."""
        return JOBS[self.module].batches[accelerator] * (self.devices if self.weak else 1)

    @property
    def saves(self) -> bool:
        """Whether it leaves a checkpoint and goes on behind it."""
        return not self.weak and self.strategy != UNCAPTURED

    def baseline(self, accelerator: str) -> "Case":
        """The run of one device that it is measured by."""
        uncaptured = accelerator == "cuda" and self.strategy in ("fsdp", UNCAPTURED)
        return Case(self.module, UNCAPTURED if uncaptured else SINGLE, 1)

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.module}_{self.strategy}_{self.devices}_{self.weak}".replace(" ", "_").lower()


class Plan(NamedTuple):
    """What every run has in common.

    Attributes:
        accelerator: cpu or cuda.
        folder: of all files.
        warm_up: steps that are not timed.
        steps: that are.
        block: of them, timed together.
        more: steps behind a checkpoint at their end, which a resume repeats.
        timeout: seconds a run may take.
    """

    accelerator: str
    folder: Path
    warm_up: int
    steps: int
    block: int
    more: int
    timeout: float

    @property
    def saved(self) -> int:
        """Step of the checkpoint."""
        return self.warm_up + self.steps


class Outcome(NamedTuple):
    """What a run left: seconds a step by block, bytes at most by rank, losses by step; or why it failed."""

    seconds: list[float]
    peak_bytes: int
    losses: dict[int, float]
    devices: tuple[str, ...]
    error: str = ""

    @property
    def rate(self) -> float:
        """Steps a second, the median over blocks."""
        return 1 / statistics.median(self.seconds)


def run(case: Case, plan: Plan, *, source: Case | None = None, device: int = 0) -> Outcome:
    """Run a case from the beginning, or from the checkpoint of another's run.

    Args:
        case: what to run.
        plan: how long, and where.
        source: whose checkpoint it takes up.
        device: number of the CUDA device that a case of one takes.
    """
    name = case.name if source is None else f"{source.name}_to_{case.name}"
    folder = plan.folder / name
    folder.mkdir()
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(_settings(case, plan, folder, device)), encoding="utf-8")
    command = [sys.executable, "-m", "lightning_modules.cli", "fit"]
    for config in (JOBS[case.module].configs[plan.accelerator], str(overlay)):
        command += ["--config", config]
    command += ["--save_dir", str(folder), "--name", "run"]
    if source is not None:
        command += ["--ckpt_path", str(checkpoint_of(source, plan))]
    error = call(command, folder / "log.txt", case.devices, plan)
    if error:
        return Outcome([], 0, {}, (), error)
    return read(folder, case.devices, plan.block)


def checkpoint_of(case: Case, plan: Plan) -> Path:
    """Where a run leaves its checkpoint."""
    run_directory = plan.folder / case.name / "run" / "version_0"
    return run_directory / "checkpoints" / f"step_{plan.saved:06d}.ckpt"


def read(folder: Path, devices: int, block: int) -> Outcome:
    """What a run left in its folder."""
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(devices)]
    # a block lasts until the slowest has done it
    seconds = [max(of_ranks) / block for of_ranks in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    table = read_metrics(folder / "run" / "version_0" / "metrics.jsonl")
    losses = dict(zip(table["step"].tolist(), table["loss"].tolist(), strict=True))
    return Outcome(
        seconds, max(rank["peak_bytes"] for rank in ranks), losses, tuple(rank["device"] for rank in ranks)
    )


def largest_difference(losses: dict[int, float], reference: dict[int, float]) -> float:
    """Largest |a - b| / |b| over the steps of the first.

    Raises:
        ValueError: there are no steps, or the reference lacks one.
    """
    if not losses or losses.keys() - reference.keys():
        raise ValueError(f"steps {sorted(losses)} are not among {sorted(reference)}")
    return max(abs(loss - reference[step]) / abs(reference[step]) for step, loss in losses.items())


def _settings(case: Case, plan: Plan, folder: Path, device: int) -> dict[str, Any]:
    job = JOBS[case.module]
    clock = {"folder": str(folder), "block": plan.block, "warm_up": plan.warm_up, "last": plan.saved}
    callbacks: list[dict[str, Any]] = [
        {"class_path": "RNGState"},
        {"class_path": "MetricsJSONL"},
        {"class_path": "benchmarks.step_clock.StepClock", "init_args": clock},
    ]
    if case.saves:
        checkpoint = {"every_n_steps": plan.saved, "keep_last": 2}
        callbacks.append({"class_path": "ResumableCheckpoint", "init_args": checkpoint})
    return {
        "model": {"init_args": job.model | ({"cuda_graph": "off"} if case.strategy == UNCAPTURED else {})},
        "data": {"init_args": {job.batch_key: case.batch(plan.accelerator)}},
        "trainer": {
            "accelerator": plan.accelerator,
            "devices": [device] if plan.accelerator == "cuda" and case.devices == 1 else case.devices,
            "strategy": _STRATEGIES[case.strategy],
            "max_steps": plan.saved + (plan.more if case.saves else 0),
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": callbacks,
        },
    }


def call(command: list[str], log: Path, devices: int, plan: Plan) -> str:
    """Run a command as so many processes; nothing, or in one line why it failed.

    They are told of each other as by Lightning's launcher, which starts the second only once the first has
    imported everything.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if plan.accelerator == "cpu":
        environment["OMP_NUM_THREADS"] = "1"  # so that processes do not take each other's cores
    if devices > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "NODE_RANK": "0"}
    with log.open("w", encoding="utf-8") as output:
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | ({"LOCAL_RANK": str(rank)} if devices > 1 else {}),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            for rank in range(devices)
        ]
        try:
            status = _status_of_all(processes, plan.timeout)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the session of this process alone
                process.wait()
    if status == 0:
        return ""
    if status is None:
        return f"not done after {plan.timeout:.0f} s"
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line or "error:" in line] or lines or [""]
    return f"status {status}: {said[0]}".replace("|", "/")[:300]


def _status_of_all(processes: list[subprocess.Popen[bytes]], timeout: float) -> int | None:
    """0 once all have ended well, the first other status as soon as there is one, None out of time."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        statuses = [process.poll() for process in processes]
        failed = [status for status in statuses if status]
        if failed:
            return failed[0]
        if None not in statuses:
            return 0
        time.sleep(_POLL_SECONDS)
    return None


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
