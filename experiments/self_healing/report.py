"""The page of the study, every number of it from the files of runs."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import markdown_table
from experiments.self_healing.faults import FAULTS
from experiments.self_healing.figures import (
    CAUGHT_WITHIN,
    LOSS_WITHIN,
    POISON_FACTOR,
    POISON_STEPS,
    Outcome,
    alarms,
    outcome,
    poisoned_shift,
)
from experiments.self_healing.jobs import COST_JOBS, JOBS
from experiments.self_healing.runs import CHECKPOINTS_EVERY, HEALTHY, Figures, Run, load
from theria.t_interval import t_half_width

SAVE_EVERY = 500
COST_LIMIT = {"cpu": 0.01, "cuda": 0.005}


def page(runs: Sequence[Run], work: Path, costs: Sequence[Figures], provenance: str) -> str:
    """Markdown of everything that was run and measured."""
    healthy = [load(run, work) for run in runs if run.fault == HEALTHY]
    faulty = [load(run, work) for run in runs if run.fault != HEALTHY]
    lines = ["# Training that heals itself", "", provenance, ""]
    if runs:
        lines += [*_jobs(), ""]
        lines += ["## False alarms", "", *_false_alarms(healthy), ""]
        lines += ["## Injected faults", "", *_faults(faulty, healthy), ""]
        lines += ["## What happens beyond", "", *_beyond(faulty), ""]
        lines += ["## The baseline is not poisoned", "", *_poison(healthy), ""]
    if costs:
        lines += ["## What watching costs", "", *_costs(costs), ""]
    return "\n".join(lines)


def _jobs() -> list[str]:
    rows = [[name, f"configs/{job.configuration}", job.changes] for name, job in JOBS.items()]
    return markdown_table(["job", "configuration", "changes"], rows)


def _false_alarms(healthy: Sequence[Figures]) -> list[str]:
    rows = []
    for name in JOBS:
        own = [run for run in healthy if run["job"] == name]
        if not own:
            continue
        streams = [[loss for _, loss in run["losses"]] for run in own]
        tail = [statistics.stdev(stream[-100:]) for stream in streams]
        rows.append(
            [
                name,
                str(len(own)),
                str(sum(len(stream) for stream in streams)),
                str(sum(len(run["rollbacks"]) for run in own)),
                str(sum(alarms(stream, "plain", patience=1) for stream in streams)),
                str(sum(alarms(stream, "plain", patience=2) for stream in streams)),
                f"{statistics.fmean(tail):.3f}",
            ]
        )
    total = sum(len(run["rollbacks"]) for run in healthy)
    header = ["job", "runs", "steps", "rollbacks", "alarms of plain +5%", "the same on 2 steps running"]
    return [
        "Healthy runs with PPLDeltaRollback as it is by default. Beside it, what the plain rule, perplexity "
        "5% above its exponential mean, would have raised on the same losses (`trigger: plain`; each alarm "
        "is forgotten at once, and nothing is taken back). The noise is the standard deviation of the loss "
        "over the last 100 steps, in nats.",
        "",
        *markdown_table([*header, "noise"], rows),
        "",
        f"**{total} rollbacks in {sum(len(run['losses']) for run in healthy)} healthy steps** (target 0).",
    ]


def _faults(faulty: Sequence[Figures], healthy: Sequence[Figures]) -> list[str]:
    rows, found = [], []
    for name, fault in FAULTS.items():
        for run in (run for run in faulty if run["fault"] == name and fault.is_counted):
            result = outcome(run, _undisturbed(run, healthy))
            found.append(result)
            rows.append([fault.title, run["job"], *_cells(run, result)])
    caught, healed = sum(r.is_caught for r in found), sum(r.is_healed for r in found)
    where = ["broken, first bad, taken back at step", "to step"]
    header = ["fault", "job", "caught after steps", *where, "final loss", "beside undisturbed"]
    return [
        f"Each is a real run of the whole length, with checkpoints every {CHECKPOINTS_EVERY} steps and all "
        "else by default. A fault is caught so many steps after the first broken one (0: at that step "
        "itself). A wrong rate shows only once its steps have moved the weights, hence the step that was "
        "judged bad first. The "
        "final loss is that of validation (query loss of the meta-learner, bits per byte of the language "
        "models), beside the healthy run of the same seed, which has seen the skipped batches and not those "
        "that stand in for them.",
        "",
        *markdown_table(header, rows),
        "",
        f"**{caught} of {len(found)} caught within {CAUGHT_WITHIN} steps; {healed} of {len(found)} end "
        f"within {LOSS_WITHIN:.0%} of the undisturbed run**; the largest difference is "
        f"{max((abs(r.loss_change) for r in found), default=0.0):.2%}.",
    ]


def _beyond(faulty: Sequence[Figures]) -> list[str]:
    title = FAULTS["for_ever"].title
    endless = [run for run in faulty if run["fault"] == "for_ever"]
    stops = [f"- {run['job']}, {title}: `{run['stopped']}`" for run in endless]
    return [
        "What does not stop to break ends at the cap:",
        "",
        *stops,
    ]


def _poison(healthy: Sequence[Figures]) -> list[str]:
    shifts = [poisoned_shift([loss for _, loss in run["losses"]]) for run in healthy]
    return [
        f"Behind each of the {len(shifts)} healthy runs, {POISON_STEPS} steps at {POISON_FACTOR:g} times the "
        f"baseline's perplexity: it moves by at most **{max(shifts):.3%}** (target 1%).",
    ]


def _costs(costs: Sequence[Figures]) -> list[str]:
    rows = []
    for cost in costs:
        mean, half = _interval(cost["shares"])
        save = cost["save_seconds"] / (SAVE_EVERY * cost["step_seconds"])
        rows.append(
            [
                cost["job"],
                f"configs/{COST_JOBS[cost['job']].configuration}, {COST_JOBS[cost['job']].changes}",
                cost["device"],
                f"{1e3 * cost['step_seconds']:.2f}",
                f"{mean:.3%} ± {half:.3%}",
                f"{COST_LIMIT[cost['device']]:.1%}",
                f"{cost['save_seconds']:.3f}",
                f"{save:.3%}",
            ]
        )
    header = ["job", "configuration", "device", "ms a step", "hooks, share of a step", "limit"]
    return [
        "Time inside the hooks of PPLDeltaRollback and MetricsJSONL beside that of the steps, in blocks of "
        "100 steps: mean and 95% interval over blocks. On CUDA both are times of the stream, so they contain "
        "what the device does for the hooks and what it waits for. A checkpoint, of which a ring writes one "
        f"every {SAVE_EVERY} steps by default, stands apart.",
        "",
        *markdown_table([*header, "seconds a checkpoint", f"of {SAVE_EVERY} steps"], rows),
    ]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95% t-interval."""
    return statistics.fmean(values), t_half_width(float(np.std(values, ddof=1)), len(values))


def _cells(run: Figures, result: Outcome) -> list[str]:
    name = JOBS[run["job"]].validation_loss
    after = ", ".join("not" if steps is None else str(steps) for steps in result.caught_after)
    back = ", ".join(str(rollback["to"]) for rollback in run["rollbacks"])
    broken = run["losses"][run["hit"][0] - 1][0]
    steps = ", ".join(f"{rollback['first_bad']}, {rollback['at']}" for rollback in run["rollbacks"])
    final = f"{run['validation'][name]:.4f}" if run["validation"] else "stopped"
    return [
        after,
        f"{broken}, {steps}",
        back,
        final,
        f"{result.loss_change:+.2%}" if run["validation"] else "",
    ]


def _undisturbed(run: Figures, healthy: Sequence[Figures]) -> Figures:
    return next(other for other in healthy if all(other[key] == run[key] for key in ("job", "seed", "steps")))


def load_costs(paths: Sequence[Path]) -> list[Figures]:
    """Figures of costs that were measured."""
    return [json.loads(path.read_text()) for path in paths if path.exists()]
