"""The attention benchmark's tables say what was measured."""

import torch

from benchmarks.attention_report import (
    BOTH,
    FIRST,
    SECOND,
    Case,
    Measurement,
    draw_picture,
    first_calls,
    report,
)

CASES = [Case(4, 16, length, 64, torch.bfloat16, causal=True) for length in (1024, 2048)]
RESULTS = {
    (CASES[0], BOTH, "triton_fused"): Measurement(1.0, 65.0, 4.5),
    (CASES[1], BOTH, "triton_fused"): Measurement(4.0, 130.0),
    (CASES[0], BOTH, "torch MATH"): Measurement(8.0, 3000.0),
    (CASES[1], BOTH, "torch MATH"): Measurement(failure="out of memory"),
    (CASES[0], SECOND, "triton_fused"): Measurement(0.5, 65.0),
}


def test_useful_operations():
    assert Case(2, 3, 10, 8, torch.float32, causal=False).flops(1) == 2 * 2 * 3 * 10 * 10 * 8
    assert Case(2, 3, 10, 8, torch.float32, causal=True).flops(7) == 7 * 2 * 3 * 10 * 10 * 8


def test_each_row_is_a_ratio_with_its_share_of_the_ceiling():
    lines = report(RESULTS, {torch.bfloat16: 800.0})
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| t")}
    titles = [line for line in lines if line.startswith("## ")]
    assert titles == [f"## {BOTH}: E 64, bfloat16, causal", f"## {SECOND}: E 64, bfloat16, causal"]
    # 19 and 29 products of 4 x 16 x 1024^2 x 64 / 2 multiply-adds in a millisecond, of 800 TFLOP/s
    whole = next(line for line in lines if "130 MiB" in line)
    assert "1.00 ms (1.00x), 65 MiB, 10% [16%]" in whole
    assert whole.endswith("| 2.00 |  | 1.00 |")
    assert "8.00 ms (8.00x), 3000 MiB, 1% | out of memory |" in rows["torch MATH"]
    second = next(line for line in lines if "0.50 ms" in line)
    assert "0.50 ms (1.00x), 65 MiB, 13% [21%]" in second
    assert FIRST not in "".join(titles).replace(BOTH, "")


def test_the_growth_of_a_heads_time_is_fitted_over_long_sequences_of_any_batch():
    long = [Case(4, 16, 4096, 64, torch.bfloat16, True), Case(1, 2, 16384, 64, torch.bfloat16, True)]
    short = Case(4, 16, 512, 64, torch.bfloat16, True)
    times = {short: 60.0, long[0]: 64.0, long[1]: 32.0}
    results = {(case, BOTH, "triton_fused"): Measurement(ms, 1.0) for case, ms in times.items()}
    lines = report(results, {torch.bfloat16: 800.0})
    assert "| time ~ N^ | a head's time ~ N^ from 4096 | memory ~ N^ |" in lines[3]
    assert lines[5].endswith("| 0.03 | 2.00 | 0.00 |")


def test_the_picture_is_drawn(tmp_path):
    draw_picture(RESULTS, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_the_first_of_all_sizes_compiles():
    (line,) = first_calls(RESULTS)
    assert line.endswith(": triton_fused: E 64, bfloat16, causal 4.5 s.")
