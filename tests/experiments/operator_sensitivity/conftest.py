"""Rows of the study without training, as the fixture ``made``."""

import dataclasses
from types import SimpleNamespace

import pandas as pd
import pytest

from experiments.operator_sensitivity.columns import COLUMNS
from experiments.operator_sensitivity.ledger import in_order
from experiments.operator_sensitivity.runs import Run

TINY = Run(
    inner_steps=1, outer_steps=4, meta_batch=2, seq_len=4, width=4, num_classes=2, num_signal_positions=1
)


def row(run: Run, accuracy: float, **figures: object) -> dict[str, object]:
    """A successful run's row, every figure of which may be given."""
    values: dict[str, object] = dict.fromkeys(COLUMNS, "")
    values |= {"dtype": "float32", "compute_dtype": "float32", "autocast": False, "final_loss": 1 - accuracy}
    values |= {"final_acc": accuracy, "final_acc_ci95": 0.01, "attn_grad_present": True}
    values |= {f"attn_grad_norm_{letter}": 0.5 for letter in "qkv"}
    values |= {"attn_second_order_ok": True, "attn_second_order_path": 1.0, "attn_rel_diff": 0.3}
    values |= {"rel_diff_full_vs_fo": 0.4, "convergence_delta": 0.2, "steps_to_90pct": 3}
    values |= {"wall_time_total_s": 2.0, "mean_outer_step_time_s": 0.5, "peak_cuda_mem_bytes": float("nan")}
    values |= {"status": "OK", "error": "", "versions": "torch 0", "commit": "abc", "run_id": run.run_id}
    return values | dataclasses.asdict(run) | figures


def table(rows: list[dict[str, object]]) -> pd.DataFrame:
    """As a ledger gives it."""
    return in_order(pd.DataFrame(rows, columns=list(COLUMNS)))


def pairs(gains: list[float], base: Run = TINY, accuracy: float = 0.5, **figures: object) -> list[dict]:
    """FULL and FO at seeds 0, 1, ..., FULL better by these gains; seeds differ far more than modes."""
    found = []
    for seed, gain in enumerate(gains):
        full, first = (dataclasses.replace(base, seed=seed, mode=mode) for mode in ("FULL", "FO"))
        found += [
            row(full, accuracy + 0.03 * seed + gain, **figures),
            row(first, accuracy + 0.03 * seed, **figures),
        ]
    return found


@pytest.fixture
def made() -> SimpleNamespace:
    return SimpleNamespace(TINY=TINY, row=row, table=table, pairs=pairs)
