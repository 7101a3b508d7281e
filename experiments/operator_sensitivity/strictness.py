"""FO and FO_STRICT compute the same meta-gradient; here the study asserts it, step by step."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.operator_sensitivity.ledger import Ledger
from experiments.operator_sensitivity.runs import PAIRED
from experiments.operator_sensitivity.statistics import successful

RTOL, ATOL = 1e-4, 1e-6


@dataclass(frozen=True)
class StrictAgreement:
    """How far FO and FO_STRICT are apart, which in exact arithmetic they are not.

    Attributes:
        compared: pairs of runs.
        steps: outer steps compared.
        largest: largest difference of the query loss at any step of any pair, relative to it.
        disagreeing: descriptions of the pairs that are beyond the tolerance.
    """

    compared: int
    steps: int
    largest: float
    disagreeing: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether something was compared and all of it agrees."""
        return self.compared > 0 and not self.disagreeing


def strict_agreement(table: pd.DataFrame, ledger: Ledger) -> StrictAgreement:
    """Compare FO with FO_STRICT at every outer step: query loss, accuracy and gradient norms.

    Two values agree within 1e-4 of themselves plus 1e-6, some thousand roundings of float32.
    """
    good = successful(table)
    first, strict = (good[good["mode"] == mode] for mode in ("FO", "FO_STRICT"))
    compared, steps, largest, disagreeing = 0, 0, 0.0, []
    joined = first.merge(strict[[*PAIRED, "run_id"]], on=list(PAIRED), suffixes=("", "_strict"))
    for _, row in joined.iterrows():
        one, other = ledger.curves(row["run_id"]), ledger.curves(row["run_id_strict"])
        if one is None or other is None:
            continue
        compared += 1
        steps += len(one["loss"])
        largest = max(largest, float(np.max(np.abs(one["loss"] - other["loss"]) / np.abs(one["loss"]))))
        apart = [
            name for name, values in one.items() if not np.allclose(values, other[name], rtol=RTOL, atol=ATOL)
        ]
        if apart:
            label = f"{row['backend']} {row['variant']} k={row['inner_steps']} seed {row['seed']}"
            disagreeing.append(f"{label} ({', '.join(apart)})")
    return StrictAgreement(compared, steps, largest, tuple(disagreeing))
