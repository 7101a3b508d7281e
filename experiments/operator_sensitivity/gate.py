"""What has to be known before the runs of a fused kernel start."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from experiments.operator_sensitivity.columns import OK
from experiments.operator_sensitivity.runs import BASELINE, FIELDS, GATED, Run, from_fields
from experiments.operator_sensitivity.statistics import gains, successful

REFERENCE_GRID, TASK_DIFFICULTY = "reference-grid", "task-difficulty"
CONDITIONS = (REFERENCE_GRID, TASK_DIFFICULTY)
_CEILING = 0.995


@dataclass(frozen=True)
class Condition:
    """One thing that must be so, whether it is, and what says so."""

    name: str
    met: bool
    evidence: tuple[str, ...]
    overridden: bool = False


@dataclass(frozen=True)
class Verdict:
    """The gate's answer."""

    conditions: tuple[Condition, ...]

    @property
    def opens(self) -> bool:
        """Whether every condition is met or overridden."""
        return all(condition.met or condition.overridden for condition in self.conditions)

    def lines(self) -> list[str]:
        """The verdict and its evidence, for people."""
        said = [f"gate: {'OPEN' if self.opens else 'CLOSED'} for {', '.join(GATED)}"]
        for condition in self.conditions:
            state = "met" if condition.met else "NOT MET"
            said.append(f"  {condition.name}: {state}{', overridden' if condition.overridden else ''}")
            said += [f"    {line}" for line in condition.evidence]
        if not self.opens:
            names = " ".join(c.name for c in self.conditions if not c.met and not c.overridden)
            said.append(f"  to run all the same: --override-gate {names}")
        return said


def judge(gated: Sequence[Run], table: pd.DataFrame, overridden: Collection[str] = ()) -> Verdict:
    """Whether the gated runs' reference grid is complete, and the task tells the modes apart.

    Args:
        gated: the runs that wait.
        table: rows of everything done so far.
        overridden: names of conditions that shall not hold them up.
    """
    found = (_reference_grid(gated, table), _task_difficulty(gated, table))
    return Verdict(tuple(replace(c, overridden=not c.met and c.name in overridden) for c in found))


def verdict_on(table: pd.DataFrame) -> Verdict | None:
    """The gate as the rows of a study have it; None where it has no gated run."""
    rows = table.loc[table["backend"].isin(GATED), list(FIELDS)].to_dict("records")
    if not rows:
        return None
    gated = [from_fields({str(name): value for name, value in row.items()}) for row in rows]
    return judge(gated, table)


def counterparts(gated: Sequence[Run], device: str) -> dict[str, Run]:
    """The reference runs of the same configurations, unharmed, on a device."""
    runs = (replace(run, backend="reference", variant=BASELINE, device=device) for run in gated)
    return {run.run_id: run for run in runs}


def _reference_grid(gated: Sequence[Run], table: pd.DataFrame) -> Condition:
    done = set(table.loc[table["status"] == OK, "run_id"])
    evidence = []
    met = False
    for device in ("cpu", "cuda"):
        wanted = counterparts(gated, device)
        count = len(done & set(wanted))
        met = met or count == len(wanted)
        evidence.append(f"{count} of {len(wanted)} reference runs succeeded on {device}")
    return Condition(REFERENCE_GRID, met, tuple(evidence))


def _task_difficulty(gated: Sequence[Run], table: pd.DataFrame) -> Condition:
    """FULL above FO at some depth above 1, in a task that is neither at chance nor at its ceiling.

    At one inner step the two differ at any difficulty; what is asked is whether second order still pays at
    sufficient inner depth.
    """
    ids = {run_id for device in ("cpu", "cuda") for run_id in counterparts(gated, device)}
    own = successful(table[table["run_id"].isin(ids)])
    if own.empty:
        return Condition(TASK_DIFFICULTY, False, ("there is no reference run to judge by",))
    best, chance = own["final_acc"].max(), 1 / own["num_classes"].min()
    evidence = [
        f"best accuracy {best:.4f}, chance {chance:.4f}, ceiling {_CEILING}",
        "FULL is to be above FO at some depth above k=1:",
    ]
    separated = False
    for _, row in gains(own).iterrows():
        above, deep = bool(row["low"] > 0), row["inner_steps"] > 1
        separated = separated or (above and deep)
        evidence.append(
            f"k={row['inner_steps']} on {row['device']}: FULL - FO = {row['gain']:+.4f}"
            f" [{row['low']:+.4f}, {row['high']:+.4f}] over {row['pairs']} seeds"
            f"{', above zero' if above else ''}{'' if deep else ', too shallow to count'}"
        )
    return Condition(TASK_DIFFICULTY, bool(chance < best < _CEILING) and separated, tuple(evidence))
