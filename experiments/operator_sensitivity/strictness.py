"""FO and FO_STRICT compute the same meta-gradient; here the study asserts it, step by step."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.operator_sensitivity.columns import OK
from experiments.operator_sensitivity.ledger import Curves, Ledger
from experiments.operator_sensitivity.runs import PAIRED

RTOL, ATOL = 1e-4, 1e-6
_BOTH = ("FO", "FO_STRICT")


@dataclass(frozen=True)
class StrictAgreement:
    """How far FO and FO_STRICT are apart, which in exact arithmetic they are not.

    Attributes:
        compared: pairs that the study has to compare: none where it has no FO_STRICT run, or else one for
            every run of either mode.
        steps: outer steps compared.
        largest: largest difference of the query loss at any step of any pair, relative to it.
        apart: descriptions of the pairs that are beyond the tolerance, or have a run without figures or
            curves.
        alone: descriptions of the runs whose partner has no row.
    """

    compared: int
    steps: int
    largest: float
    apart: tuple[str, ...]
    alone: tuple[str, ...]

    @property
    def disagreeing(self) -> tuple[str, ...]:
        """Descriptions of all pairs that were not found to agree."""
        return self.apart + self.alone

    @property
    def holds(self) -> bool:
        """Whether something was compared and all of it agrees."""
        return self.compared > 0 and not self.disagreeing


def strict_agreement(table: pd.DataFrame, ledger: Ledger) -> StrictAgreement:
    """Compare FO with FO_STRICT at every outer step: query loss, accuracy and gradient norms.

    Two values agree within 1e-4 of themselves plus 1e-6, some thousand roundings of float32. A pair that
    cannot be compared does not agree: a run failed, is not finite, has no curves, or has no partner.
    """
    if not (table["mode"] == _BOTH[1]).any():
        return StrictAgreement(0, 0, 0.0, (), ())
    compared, steps, largest = 0, 0, 0.0
    apart: list[str] = []
    alone: list[str] = []
    for _, rows in table[table["mode"].isin(_BOTH)].groupby(list(PAIRED), sort=False):
        compared += 1
        pair = {str(row["mode"]): row for _, row in rows.iterrows()}
        label = _label(rows.iloc[0])
        missing = [mode for mode in _BOTH if mode not in pair]
        if missing:
            alone.append(f"{label} (no {missing[0]} run)")
            continue
        curves = {mode: ledger.curves(str(row["run_id"])) for mode, row in pair.items()}
        lacking = _lacking(pair, curves)
        one, other = (curves[mode] for mode in _BOTH)
        if lacking or one is None or other is None:
            apart.append(f"{label} ({', '.join(lacking)})")
            continue
        steps += len(one["loss"])
        difference = np.max(np.abs(np.subtract(one["loss"], other["loss"])) / np.abs(one["loss"]))
        largest = float(np.maximum(largest, difference))
        unlike = [
            name for name, values in one.items() if not np.allclose(values, other[name], rtol=RTOL, atol=ATOL)
        ]
        if unlike:
            apart.append(f"{label} ({', '.join(unlike)})")
    return StrictAgreement(compared, steps, largest, tuple(apart), tuple(alone))


def _lacking(pair: dict[str, pd.Series], curves: dict[str, Curves | None]) -> list[str]:
    """Why two runs cannot be compared; nothing if they can."""
    found = [f"{mode} is {pair[mode]['status']}" for mode in _BOTH if pair[mode]["status"] != OK]
    return found or [f"{mode} has no curves" for mode in _BOTH if curves[mode] is None]


def _label(row: pd.Series) -> str:
    return f"{row['backend']} {row['variant']} k={row['inner_steps']} seed {row['seed']} on {row['device']}"
