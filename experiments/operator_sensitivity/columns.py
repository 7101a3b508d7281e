"""What a row of the study's CSV holds, and what makes a line one."""

import csv
import dataclasses

from experiments.operator_sensitivity.runs import BACKENDS, FIELDS, MODES, Run, from_fields

RESULTS = (
    "dtype",
    "compute_dtype",
    "autocast",
    "final_loss",
    "final_acc",
    "final_acc_ci95",
    "attn_grad_present",
    "attn_grad_norm_q",
    "attn_grad_norm_k",
    "attn_grad_norm_v",
    "attn_second_order_ok",
    "attn_second_order_path",
    "attn_rel_diff",
    "rel_diff_full_vs_fo",
    "convergence_delta",
    "steps_to_90pct",
    "wall_time_total_s",
    "mean_outer_step_time_s",
    "peak_cuda_mem_bytes",
    "status",
    "error",
    "versions",
    "commit",
)
COLUMNS = ("run_id", *FIELDS, *RESULTS)
OK, FAILED, NON_FINITE = "OK", "FAILED", "NON_FINITE"

_KNOWN = {"status": (OK, FAILED, NON_FINITE), "mode": MODES, "backend": BACKENDS}
_TEXT = ("dtype", "compute_dtype", "status", "error", "versions", "commit")
_TRUTH = ("autocast", "attn_grad_present", "attn_second_order_ok")
_OF_SUCCESS = ("final_loss", "final_acc", *_TRUTH)


def check_line(line: bytes) -> None:
    """Refuse a line of the CSV that is not a whole row, or whose run is not the one of its run_id.

    Raises:
        ValueError: says what is wrong; UnicodeDecodeError is one.
        csv.Error: for quotes that do not match.
    """
    cells = next(csv.reader([line.decode()], strict=True), [])
    if len(cells) != len(COLUMNS):
        raise ValueError(f"it has {len(cells)} cells instead of {len(COLUMNS)}")
    row = dict(zip(COLUMNS, cells, strict=True))
    for name, known in _KNOWN.items():
        if row[name] not in known:
            raise ValueError(f"{name} is {row[name]!r}, none of {', '.join(known)}")
    for name in RESULTS:
        if not row[name] and (row["status"] != OK or name not in _OF_SUCCESS):
            continue
        if name in _TRUTH and row[name] not in ("True", "False"):
            raise ValueError(f"{name} is {row[name]!r}, neither True nor False")
        if name not in (*_TEXT, *_TRUTH):
            _number(name, row[name])
    if row["run_id"] != _run(row).run_id:
        raise ValueError(f"its run_id {row['run_id']!r} is not that of its fields, {_run(row).run_id!r}")


def _run(row: dict[str, str]) -> Run:
    defaults = dataclasses.asdict(Run())
    values: dict[str, object] = {name: row[name] for name in FIELDS}
    for name in FIELDS:
        if isinstance(defaults[name], bool):
            values[name] = row[name] == "True"
    return from_fields(values)


def _number(name: str, text: str) -> None:
    try:
        float(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}, no number") from error
