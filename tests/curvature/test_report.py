"""What an audit found, as rows, JSON, terminal tables and Markdown."""

import csv
import io
import json
import math
from functools import partial

import pytest
import torch
from rich.console import Console

from theria.attention import scaled_dot_product_attention
from theria.curvature import Case, MetaTask, audit
from theria.curvature.markdown import write_markdown
from theria.curvature.report import as_dict, remarks, rows, tables, write_csv, write_json
from theria.provenance import device_name
from theria.tasks.synthetic_seqcls import SeqClsSpec

REFERENCE = partial(scaled_dot_product_attention, backend="reference")
TASK = MetaTask(SeqClsSpec(length=6, width=8, num_classes=3, support_size=3, query_size=3), tasks=2)
CASES = (Case(1, 2, 5, 5, 8), Case(1, 2, 3, 5, 8, causal=True))
PUBLISHED = [
    "wrapper",
    "attention_backend",
    "status",
    "second_order_path_all",
    "second_order_path_any",
    "second_order_path_attn_all",
    "second_order_path_attn_any",
    "second_order_path_head_all",
    "second_order_path_head_any",
    "attn_second_order_ok",
    "rel_diff_mean",
    "error",
]


def reported(function=REFERENCE, **options):
    options = {"cases": CASES, "task": TASK, "inner_steps": (1, 2), "steps": 2, **options}
    return audit(function, name="mine", **options)


def cut(query, key, value, is_causal=False):
    with torch.no_grad():
        return REFERENCE(query, key, value, is_causal=is_causal)


def once(query, key, value, is_causal=False):
    if is_causal:
        raise NotImplementedError("no causal mask here")
    return REFERENCE(query, key, value)


def test_rows_begin_with_the_published_columns_and_there_is_one_a_depth():
    found = rows(reported())
    assert list(found[0])[:12] == PUBLISHED
    assert [(row["inner_steps"], row["steps"]) for row in found] == [(1, 2), (2, 2)]
    for row in found:
        assert (row["wrapper"], row["attention_backend"]) == ("baseline", "mine")
        assert (row["status"], row["verdict"], row["error"]) == ("OK", "SAFE", None)
        assert all(row[name] is True for name in PUBLISHED[3:10])
        for kind in ("forward", "vjp", "jvp", "hvp", "forward_over_reverse"):
            assert 0 < row[f"{kind}_rel_error"] < 1e-4
            assert row[f"{kind}_of_allowed"] == pytest.approx(row[f"{kind}_rel_error"] / 1e-3)
        for name in ("query", "key", "value", "cotangent", "q_proj", "k_proj", "v_proj"):
            assert row[f"surviving_{name}"] == pytest.approx(1, abs=1e-4)
        assert 0 < row["hvp_rel_error_query"] <= row["hvp_rel_error"]
        assert row["meta_gradient_rel_error"] < 1e-4
    assert found[0]["rel_diff_mean"] != found[1]["rel_diff_mean"]


def test_rows_of_a_failure_say_no_and_why():
    for row in rows(reported(cut)):
        assert (row["status"], row["verdict"]) == ("HARD_FAIL_UNUSED", "HARD_FAIL")
        assert not any(row[name] for name in PUBLISHED[3:10])
        assert row["rel_diff_mean"] is None
        assert "not" in row["error"]
        assert row["hvp_rel_error"] is None


def test_without_depths_there_is_one_row_and_nothing_of_maml_is_claimed():
    (row,) = rows(reported(inner_steps=()))
    assert row["second_order_path_all"] is None
    assert row["rel_diff_mean"] is None
    assert row["attn_second_order_ok"] is True


def test_csv_and_json_can_be_read_back(tmp_path):
    reports = [reported(), reported(cut)]
    write_csv([row for report in reports for row in rows(report)], tmp_path / "audit.csv")
    with open(tmp_path / "audit.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["status"] for row in read] == ["OK", "OK", "HARD_FAIL_UNUSED", "HARD_FAIL_UNUSED"]
    assert read[2]["rel_diff_mean"] == ""
    write_json(reports, tmp_path / "audit.json")
    sound, broken = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert sound["verdict"] == "SAFE"
    assert sound["cases"][1]["case"] == "1x2, 3 queries, 5 keys, dim 8, causal"
    assert sound["cases"][0]["shares"]["hvp, key along query"] == pytest.approx(1)
    assert sound["depths"][1]["probes"][0]["paths"]["attn"]["exists"] is True
    assert broken["findings"][0]["verdict"] == "HARD_FAIL"
    assert broken["cases"][0]["failure"]["order"] == 1


def test_json_has_no_numbers_that_json_has_not():
    def infinite(query, key, value, is_causal=False):
        return REFERENCE(query, key, value, is_causal=is_causal) * math.inf

    content = as_dict(reported(infinite, inner_steps=()))
    json.dumps(content, allow_nan=False)
    assert content["cases"][0]["deviations"]["forward, out"]["relative"] == "inf"


def printed(reports):
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables(reports):
        console.print(table)
    return console.export_text()


def test_tables_are_in_detail_for_few_and_a_line_each_for_many():
    report = reported()
    detail = printed([report])
    assert "mine, float32 on cpu: SAFE" in detail
    assert "curvature kept, cotangent" in detail
    assert "rel_diff FULL-FO, k=2" in detail
    many = printed([report, reported(cut), report])
    assert many.count("mine") == 3
    assert "HARD_FAIL" in many


def test_remarks_name_findings_absences_and_refusals():
    assert remarks(reported()) == []
    assert remarks(reported(cut))[0].startswith("HARD_FAIL: RuntimeError: element 0 of tensors")
    (refusal,) = remarks(reported(once))
    assert refusal.startswith("1 of 2 calls refused, the first (1x2, 3 queries, 5 keys, dim 8, causal)")

    def unmasked(query, key, value):
        return REFERENCE(query, key, value)

    assert remarks(reported(unmasked)) == [
        "not asked under a causal mask: there is no argument is_causal or causal"
    ]

    def square(query, key, value):
        if query.shape != key.shape:
            raise ValueError("squares alone")
        return REFERENCE(query, key, value)

    assert "takes one query a key" in remarks(reported(square))[-1]


def test_markdown_renews_the_section_of_its_device_and_dtype_alone(tmp_path):
    path = tmp_path / "kernel_safety.md"
    path.write_text("# Title\n\n## Some GPU, float32\n\nkept as it is\n", encoding="utf-8")
    write_markdown(
        [reported()], {"other kernels, float32": "absent, not installed", "mine, bfloat16": "elsewhere"}, path
    )
    write_markdown([reported(cut)], {}, path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n## Some GPU, float32\n\nkept as it is\n\n## CPU, float32\n")
    assert text.count("## CPU, float32") == 1
    assert "| mine | float32 | HARD_FAIL |" in text
    assert "SAFE |" not in text
    assert f"torch {torch.__version__}" in text
    write_markdown(
        [reported()], {"other kernels, float32": "absent, not installed", "mine, bfloat16": "elsewhere"}, path
    )
    assert "- other kernels: absent, not installed" in path.read_text(encoding="utf-8")
    assert "elsewhere" not in path.read_text(encoding="utf-8")


def test_markdown_begins_with_what_it_is_and_says_where_its_figures_come_from(tmp_path):
    write_markdown([reported(dtype=torch.bfloat16)], {}, tmp_path / "folder" / "new.md")
    text = (tmp_path / "folder" / "new.md").read_text(encoding="utf-8")
    assert f"\nDevice: {device_name('cpu')}  \nVersions: " in text
    assert text.startswith("# Which attention implementations carry second order\n")
    assert "## CPU, bfloat16" in text
