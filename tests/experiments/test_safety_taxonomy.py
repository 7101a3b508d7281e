"""The taxonomy: what an audit has to say about each broken variant over each backend, and what is written."""

import dataclasses
import itertools
import math
from functools import partial

import pandas as pd
import pytest
import torch
from matplotlib import colormaps

from experiments.safety_taxonomy import study
from experiments.safety_taxonomy.__main__ import main, parse
from experiments.safety_taxonomy.depth import PUBLISHED, differences_by_depth
from experiments.safety_taxonomy.picture import draw
from experiments.safety_taxonomy.summary import summarise
from experiments.safety_taxonomy.variants import VARIANTS
from theria.attention import available_backends, registered_backend, scaled_dot_product_attention
from theria.attention.triton_fused import launches
from theria.curvature import Case, MetaTask, Status, Verdict, as_backend, audit
from theria.maml import meta_gradient
from theria.models.seq_classifier import SeqClassifier
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

REFERENCE = partial(scaled_dot_product_attention, backend="reference")
TASK = MetaTask(SeqClsSpec(length=8, width=16, num_classes=3, support_size=4, query_size=4), tasks=4)
CASES = (
    Case(1, 2, 9, 9, 16),
    Case(1, 2, 9, 9, 16, causal=True),
    Case(1, 2, 1, 12, 16),
    Case(1, 2, 5, 12, 16, causal=True, strided=True),
    Case(1, 2, 17, 17, 16, magnitude=3.0),
)


def audited(name: str, backend: str, **options):
    variant = VARIANTS[name]
    options = {"cases": CASES, "task": TASK, "inner_steps": (1,), "steps": 2, **options}
    base = partial(scaled_dot_product_attention, backend=backend)
    return variant, audit(variant.wrap(base), name=backend, wrapper=name, **options)


@pytest.mark.parametrize("backend", ["reference", "custom"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_has_its_verdict_and_status(name, backend):
    variant, report = audited(name, backend)
    assert report.verdict is variant.verdict, report.findings
    assert report.status is variant.status
    assert report.collapsed == variant.collapsed
    assert report.status is not Status.HARD_FAIL_OTHER


@pytest.mark.skipif("triton_fused" not in available_backends(), reason="Triton is not installed")
@pytest.mark.parametrize(
    "name", ["baseline", "stats_detach_softmax_output_sdpa", "once_differentiable_sim", "raw_kernel_backward"]
)
def test_the_same_over_the_triton_kernels(name):
    launches.clear()
    variant, report = audited(name, "triton_fused", cases=[Case(1, 1, 3, 5, 16, causal=True)], inner_steps=())
    assert report.verdict is variant.verdict, report.findings
    assert report.status is variant.status
    assert report.collapsed == variant.collapsed
    assert launches["forward_rows"] > 0


def test_the_expectations_are_those_of_the_taxonomy():
    collapsing = ("detach_attention_output", "stats_detach_logits_sdpa", "stats_detach_softmax_output_sdpa")
    expected = {
        "baseline": Verdict.SAFE,
        "checkpoint": Verdict.SAFE,
        "no_grad_attention": Verdict.HARD_FAIL,
        "once_differentiable_sim": Verdict.FIRST_ORDER_ONLY,
        "frozen_statistics": Verdict.WRONG_CURVATURE,
        "scaled_output": Verdict.WRONG_FORWARD,
        "base_two_gradient": Verdict.WRONG_GRADIENT,
        **dict.fromkeys(
            (*collapsing, "raw_kernel_backward", "detach_query", "detach_key", "detach_value"),
            Verdict.SILENT_COLLAPSE,
        ),
    }
    assert {name: VARIANTS[name].verdict for name in expected} == expected
    assert VARIANTS["no_grad_attention"].status is Status.HARD_FAIL_UNUSED
    assert VARIANTS["once_differentiable_sim"].status is Status.HARD_FAIL_ONCE_DIFF
    for name in ("query", "key", "value"):
        assert VARIANTS[f"detach_{name}"].collapsed == (name,)
    assert all(variant.imitates for variant in VARIANTS.values())


@pytest.mark.parametrize("name", list(VARIANTS))
def test_only_the_scaled_output_changes_the_forward(name):
    inputs = [torch.randn(2, 3, 7, 16) for _ in range(3)]
    base = partial(scaled_dot_product_attention, backend="reference")
    for causal in (False, True):
        out = VARIANTS[name].wrap(base)(*inputs, is_causal=causal)
        factor = 1.01 if name == "scaled_output" else 1
        torch.testing.assert_close(out, factor * base(*inputs, is_causal=causal))


@pytest.mark.parametrize("name", ["stats_detach_logits_sdpa", "stats_detach_softmax_output_sdpa"])
def test_frozen_statistics_leave_a_path_and_next_to_no_curvature(name):
    """What the published booleans called an existing attention path."""
    _, report = audited(name, "reference")
    for step in report.depths[0].probes:
        path = step.paths["attn"]
        assert path.exists
        assert 0.01 < path.magnitude < 0.5
        assert path.kept < 0.15
        # of v_proj the block by itself, which is the loss's curvature, and neither of those with q and k
        assert path.surviving == {"q_proj": 0, "k_proj": 0, "v_proj": pytest.approx(1 / 3, abs=1e-5)}
        assert step.paths["head"].magnitude == pytest.approx(1, abs=1e-4)
    assert [report.surviving[name] for name in ("query", "key", "value")] == [0, 0, 0]


def test_a_detached_output_keeps_the_global_path_and_the_heads():
    _, report = audited("detach_attention_output", "reference")
    for step in report.depths[0].probes:
        assert step.paths[""].exists
        assert step.paths["head"].exists
        assert not step.paths["attn"].exists


def test_once_differentiable_comes_back_from_autograd_grad_without_a_word():
    """Why the audit, and `theria.maml`, ask for every leaf of the graph."""
    attend = VARIANTS["once_differentiable_sim"].wrap(
        partial(scaled_dot_product_attention, backend="reference")
    )
    query, key, value = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    gradients = torch.autograd.grad(attend(query, key, value).square().sum(), query, create_graph=True)
    again = torch.autograd.grad(gradients[0].sum() + 0 * query.sum(), query, retain_graph=True)
    assert torch.equal(again[0], torch.zeros_like(query))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


@pytest.mark.parametrize("strategy", ["unrolled", "sweep"])
def test_once_differentiable_attention_learns_in_first_order_and_stops_second_order(strategy):
    attend = VARIANTS["once_differentiable_sim"].wrap(
        partial(scaled_dot_product_attention, backend="reference")
    )
    batch = sample_tasks(TASK.spec, torch.arange(2), seed=0, epoch=0, stream="train")
    model = SeqClassifier(TASK.spec.width, TASK.spec.num_classes, backend="reference")
    learn = partial(
        meta_gradient, model, batch[:2], batch[2:4], inner_steps=2, inner_lr=0.4, strategy=strategy
    )
    expected = learn(mode="FO").grads
    with registered_backend("once", as_backend(attend)) as model.backend:
        for name, gradient in learn(mode="FO").grads.items():
            torch.testing.assert_close(gradient, expected[name])
        with pytest.raises(RuntimeError, match=r"once_differentiable|must implement the jvp"):
            learn(mode="FULL")


def test_a_run_writes_table_picture_and_summary_and_no_variant_stops_it(tmp_path, monkeypatch, capsys):
    def fails(base):
        raise MemoryError("no room for this one")

    broken = dataclasses.replace(VARIANTS["checkpoint"], wrap=fails)
    monkeypatch.setitem(VARIANTS, "checkpoint", broken)
    monkeypatch.setattr(study, "theria_backend", small_backend)
    names = ["baseline", "detach_attention_output", "no_grad_attention", "checkpoint"]
    out = tmp_path / "taxonomy.md"
    out.write_text("# Title\n\n## Some GPU, float32\n\nof another run\n", encoding="utf-8")
    arguments = ["--backend", "reference", "--variants", *names, "--steps", "1", "--inner-steps", "1", "2"]
    main([*arguments, "--seeds", "2", "--out", str(out)])
    table = pd.read_csv(tmp_path / "taxonomy_cpu_float32.csv")
    assert list(table.columns[:12]) == [
        *("wrapper", "attention_backend", "status"),
        *(f"second_order_path{part}_{over}" for part in ("", "_attn", "_head") for over in ("all", "any")),
        *("attn_second_order_ok", "rel_diff_mean", "error"),
    ]
    assert list(table["wrapper"]) == [name for name in names for _ in range(1 if name == "checkpoint" else 2)]
    failed = table[table["wrapper"] == "checkpoint"].iloc[0]
    assert (failed["status"], failed["error"]) == ("HARD_FAIL_OTHER", "MemoryError: no room for this one")
    assert (tmp_path / "taxonomy_cpu_float32.png").read_bytes().startswith(b"\x89PNG")
    report = out.read_text(encoding="utf-8")
    assert report.startswith(
        "# Title\n\n## Some GPU, float32\n\nof another run\n\n## CPU, float32\n\nCommand: "
    )
    assert "| `no_grad_attention` |" in report
    assert "HARD_FAIL (HARD_FAIL_UNUSED)" in report
    assert "Rows with HARD_FAIL_OTHER: 1 of 7." in report
    assert "](taxonomy_cpu_float32.png)" in report
    capsys.readouterr()


def small_backend(name, device, dtype):
    """Any backend at the sizes of these tests."""
    from theria.curvature.known import Implementation

    function = partial(scaled_dot_product_attention, backend=name)
    return Implementation(name, function, cases=CASES[:2], task=TASK)


def test_backends_that_are_absent_are_named(tmp_path, monkeypatch, capsys):
    from theria.curvature.known import Implementation

    def present(name, device, dtype):
        if name == "triton_fused":
            return Implementation(name, absent="Triton is not installed")
        return small_backend(name, device, dtype)

    monkeypatch.setattr(study, "theria_backend", present)
    arguments = ["--variants", "baseline", "--steps", "1", "--inner-steps", "1", "--seeds", "0"]
    main([*arguments, "--out", str(tmp_path / "all.md")])
    report = (tmp_path / "all.md").read_text(encoding="utf-8")
    assert "triton_fused is absent: Triton is not installed." in report
    assert "| variant | imitates | expected | reference | custom |" in report
    capsys.readouterr()


def test_the_command_line_is_that_of_the_study():
    args = parse(
        ["--backend", "all", "--steps", "5", "--inner-steps", "1", "5", "10", "20", "--device", "cpu"]
    )
    assert (args.backend, args.steps, args.inner_steps, args.device) == ("all", 5, [1, 5, 10, 20], "cpu")
    assert args.seeds == 20
    with pytest.raises(ValueError, match="there is no variant nonsense"):
        main(["--variants", "nonsense"])


def test_the_difference_by_depth_has_the_published_order_and_growth():
    """Not its digits: other initial weights and another task."""
    table = differences_by_depth([1, 5], range(2), torch.device("cpu"))
    means = table.groupby(["variant", "inner_steps"])["rel_diff"].mean()
    assert means["baseline", 1] < means["baseline", 5]
    for count in (1, 5):
        assert means["detach_attention_output", count] < 0.7 * means["baseline", count]
        for name, published in PUBLISHED.items():
            assert 0.5 < means[name, count] / published[count] < 2
    right = table[table["variant"] == "baseline"]["meta_gradient_rel_error"]
    assert (right == 0).all()
    wrong = table[table["variant"] == "raw_kernel_backward"]["meta_gradient_rel_error"]
    assert (wrong > 0.05).all()
    assert table["seed"].nunique() == 2


def depth_table(healthy: dict[int, list[float]], collapsed: dict[int, list[float]]) -> pd.DataFrame:
    values = {"baseline": healthy, "detach_attention_output": collapsed, "raw_kernel_backward": collapsed}
    return pd.DataFrame(
        [
            {
                "variant": name,
                "inner_steps": k,
                "seed": seed,
                "rel_diff": found,
                "meta_gradient_rel_error": 0.0 if name == "baseline" else 0.5,
            }
            for name, by_depth in values.items()
            for k, found_by_seed in by_depth.items()
            for seed, found in enumerate(found_by_seed)
        ]
    )


ROW = {
    "wrapper": "baseline",
    "attention_backend": "reference",
    "status": "OK",
    "verdict": "SAFE",
    "second_order_path_attn_any": True,
    "second_order_magnitude_attn": 1.0,
    "surviving_attn": 1.0,
    **{f"surviving_{name}": 1.0 for name in ("query", "key", "value", "cotangent")},
    **{f"surviving_{name}_proj": 1.0 for name in "qkv"},
}


def test_the_summary_says_what_the_numbers_say():
    table = pd.DataFrame([ROW])
    always = depth_table({1: [0.2, 0.3], 20: [0.8, 0.9]}, {1: [0.1, 0.1], 20: [0.4, 0.5]})
    said = summarise(table, always, [], "x.png")
    assert "suppressed in every seed at k = 1, k = 20" in said
    assert "as large as the" not in said
    overlapping = depth_table({1: [0.2, 0.3], 20: [0.8, 0.9]}, {1: [0.1, 0.1], 20: [0.4, 1.2]})
    said = summarise(table, overlapping, [], "x.png")
    assert "suppressed in every seed at k = 1;" in said
    assert "at k = 20 the curvature that remains" in said
    assert "- k = 20: 0.94 times the baseline's mean, lower in 1 of 2" in said
    assert "| `baseline` | 1 | 0.145 | 0.250 ± 0.071 | 0.200 to 0.300 | 0.000 |" in said


def test_the_picture_reads_in_grey():
    """The lightness of its colours grows evenly from gone to sound, and text stands out on each of them."""
    colours = colormaps["cividis"]([i / 10 for i in range(11)])
    lightness = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b, _ in colours]
    steps = [after - before for before, after in itertools.pairwise(lightness)]
    assert min(steps) > 0.04
    assert lightness[4] < 0.5 < lightness[6]


def test_a_table_of_nothing_but_failures_can_be_drawn(tmp_path):
    failed = {"status": "HARD_FAIL_OTHER", "verdict": "HARD_FAIL", "error": "x"}
    draw(pd.DataFrame([{**ROW, **failed, "forward_of_allowed": math.nan}]), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
