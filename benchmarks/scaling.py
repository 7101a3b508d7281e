"""Speed, memory and loss curves of both training jobs on several devices, beside one device.

    python -m benchmarks.scaling --devices 1 2 --accelerator cuda --out docs/results/scaling.md
    python -m benchmarks.scaling --devices 1 2 --accelerator cpu --out docs/results/scaling_cpu.md

Every run is `theria fit` in processes of its own. Strong scaling divides one device's batch among the
devices, weak scaling gives each as much as the one has. Runs of one GPU are done side by side, each on a GPU
of its own. Leaves with status 1 where a run failed.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.report import markdown_table, provenance
from benchmarks.scaling_runs import JOBS, SINGLE, UNCAPTURED, Case, Outcome, Plan, largest_difference, run

MIB = 2**20
# Runs that take checkpoints up are not timed: on GPUs as many of them go side by side.
RESUMES_AT_ONCE = {"cpu": 1, "cuda": 3}


def cases_of(module: str, strategies: list[str], devices: list[int], accelerator: str) -> list[Case]:
    """One device first, then every strategy and number of devices, strong and weak, beside its baseline."""
    spread = [
        Case(module, strategy, count, weak)
        for strategy in JOBS[module].strategies
        if strategy in strategies
        for count in devices
        if count > 1
        for weak in (False, True)
    ]
    baselines = [Case(module, SINGLE, 1), *(case.baseline(accelerator) for case in spread)]
    return [*dict.fromkeys(baselines), *spread]


def timed(cases: list[Case], plan: Plan, devices: int) -> dict[Case, Outcome]:
    """The outcome of every case, one after the other; on CUDA, those of one device each on one of them."""
    at_once = devices if plan.accelerator == "cuda" else 1
    alone = [case for case in cases if case.devices == 1]
    outcomes: dict[Case, Outcome] = {}
    for first in range(0, len(alone), at_once):
        together = alone[first : first + at_once]
        with ThreadPoolExecutor(at_once) as pool:
            found = pool.map(lambda place: run(place[1], plan, device=place[0]), enumerate(together))
            outcomes |= zip(together, found, strict=True)
    for case in cases:
        if case.devices > 1:
            outcomes[case] = run(case, plan)
        say(case.name, outcomes[case])
    return {case: outcomes[case] for case in cases}


def resumed(outcomes: dict[Case, Outcome], plan: Plan, devices: int) -> dict[tuple[Case, Case], Outcome]:
    """The outcome of taking up one device's checkpoint on several, and of several on one."""
    pairs = []
    for case in outcomes:
        if case.devices > 1 and case.saves:
            single = Case(case.module, SINGLE, 1)
            pairs += [(single, case), (case, single)]
    with ThreadPoolExecutor(RESUMES_AT_ONCE[plan.accelerator]) as pool:
        jobs = [pool.submit(_resume, *pair, outcomes, plan, n // 2 % devices) for n, pair in enumerate(pairs)]
    return {pair: job.result() for pair, job in zip(pairs, jobs, strict=True)}


def _resume(source: Case, case: Case, outcomes: dict[Case, Outcome], plan: Plan, device: int) -> Outcome:
    if outcomes[source].error:
        return Outcome([], 0, {}, (), "there is no checkpoint to take up")
    outcome = run(case, plan, source=source, device=device)
    say(f"{source.name} to {case.name}", outcome)
    return outcome


def say(name: str, outcome: Outcome) -> None:
    """A line of progress."""
    print(f"# {name}: {outcome.error or 'done'}", flush=True)


def case_row(case: Case, outcome: Outcome, single: Outcome, accelerator: str) -> list[str]:
    """A row of the table of runs; the error in place of the figures where there is one."""
    scaling = "" if case.devices == 1 else "weak" if case.weak else "strong"
    title = [case.module, case.strategy, str(case.devices), scaling, str(case.batch(accelerator))]
    if outcome.error:
        return [*title, f"failed: {outcome.error}", "", "", "", ""]
    slowest, fastest = (1 / pick(outcome.seconds) for pick in (max, min))
    row = [*title, f"{outcome.rate:.2f}", f"{slowest:.2f} to {fastest:.2f}"]
    if case.devices == 1 or single.error:
        return [*row, "", f"{outcome.peak_bytes / MIB:,.0f}", ""]
    efficiency = outcome.rate / single.rate / (1 if case.weak else case.devices)
    difference = "" if case.weak else f"{largest_difference(outcome.losses, single.losses):.1e}"
    return [*row, f"{efficiency:.0%}", f"{outcome.peak_bytes / MIB:,.0f}", difference]


def resume_row(source: Case, case: Case, outcome: Outcome, uninterrupted: Outcome) -> list[str]:
    """A row of the table of resumes."""
    named = [f"{each.strategy} on {each.devices}" if each.devices > 1 else SINGLE for each in (source, case)]
    if outcome.error:
        return [case.module, *named, "", f"failed: {outcome.error}"]
    difference = largest_difference(outcome.losses, uninterrupted.losses)
    return [case.module, *named, str(len(outcome.losses)), f"{difference:.1e}"]


def page(
    plan: Plan,
    outcomes: dict[Case, Outcome],
    resumes: dict[tuple[Case, Case], Outcome],
) -> str:
    """The report."""
    rows = [
        case_row(case, outcome, outcomes[case.baseline(plan.accelerator)], plan.accelerator)
        for case, outcome in outcomes.items()
    ]
    header = ["module", "strategy", "devices", "scaling", "global batch", "steps a second"]
    header += ["blocks from to", "efficiency", "peak MiB a device", "largest loss difference"]
    resume_rows = [resume_row(*pair, outcome, outcomes[pair[0]]) for pair, outcome in resumes.items()]
    resume_header = ["module", "written on", "taken up on", "steps", "largest loss difference"]
    configs = ", ".join(
        f"{module} as {job.configs[plan.accelerator]}" + "".join(f", {k} {v}" for k, v in job.model.items())
        for module, job in JOBS.items()
    )
    memory = "the allocator's" if plan.accelerator == "cuda" else "the whole process's, libraries included"
    return "\n".join(
        [
            "# Several devices beside one",
            "",
            provenance("benchmarks.scaling").rstrip(),
            f"Devices of the runs: {devices_of(outcomes)}; {interconnect(plan.accelerator)}",
            "",
            f"{configs}; precision as configured. Steps a second are the median over blocks of {plan.block}"
            f" steps, {plan.steps} steps after {plan.warm_up} of warm-up, each until the slowest process has"
            " done it, without validation. Strong: the batch of one device divided; efficiency is the rate"
            " over that of one device and over the devices. Weak: a batch as one device's on each; efficiency"
            f" is the rate over that of one device. Peak memory is {memory}, on the device that held most.",
            "",
            *markdown_table(header, rows),
            "",
            "The loss difference is the largest |a - b| / |b| over all steps, beside one device with the same"
            f" global batch. FSDP captures no CUDA graphs and is measured by {UNCAPTURED}.",
            "",
            "## A checkpoint taken up on another number of devices",
            "",
            "The same difference over the steps behind the checkpoint, beside the run that wrote it, which"
            " went on.",
            "",
            *markdown_table(resume_header, resume_rows),
            "",
        ]
    )


def devices_of(outcomes: dict[Case, Outcome]) -> str:
    """Their names and the largest number of them."""
    most = max((outcome.devices for outcome in outcomes.values()), key=len)
    return f"{len(most)} x {statistics.mode(most)}" if most else "none came to the end"


def interconnect(accelerator: str) -> str:
    """What the processes talk through."""
    if accelerator == "cpu":
        return "gloo over the loopback interface of one host, one thread a process"
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")]
    links = _links()
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return f"NCCL {version} ({', '.join(settings) or 'no settings'}), links between devices: {links}"


def _links() -> str:
    """As nvidia-smi names them (NV18 is 18 NVLinks)."""
    try:
        said = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not known"
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines()]
    # a device is X to itself, which the heading is to nothing
    links = [row[1:] for row in rows if "X" in row and re.fullmatch(r"GPU\d+", row[0])]
    found = {cell for row in links for cell in row[: len(links)] if cell != "X"}
    return ", ".join(sorted(found)) or "none"


def main() -> None:
    """Do all runs, print and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="numbers of devices")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"], choices=("ddp", "fsdp"))
    parser.add_argument("--modules", nargs="+", default=list(JOBS), choices=tuple(JOBS))
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed, a multiple of --block")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before them")
    parser.add_argument("--block", type=int, default=5, help="steps that are timed together")
    parser.add_argument("--more", type=int, default=8, help="steps that a resumed run takes")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that a run may take")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    if args.steps < args.block or args.steps % args.block:
        parser.error(f"--steps must be a multiple of --block = {args.block}, got {args.steps}")
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            args.accelerator, Path(folder), args.warm_up, args.steps, args.block, args.more, args.timeout
        )
        cases = [
            case
            for module in args.modules
            for case in cases_of(module, args.strategies, args.devices, args.accelerator)
        ]
        outcomes = timed(cases, plan, max(args.devices))
        resumes = resumed(outcomes, plan, max(args.devices))
    report = page(plan, outcomes, resumes)
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")
    if any(outcome.error for outcome in (*outcomes.values(), *resumes.values())):
        sys.exit(1)


if __name__ == "__main__":
    main()
