"""A run's figures against a plain MAML loop and against what they must be."""

import copy
import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from scipy import stats

from experiments.operator_sensitivity import fit
from experiments.operator_sensitivity.columns import COLUMNS
from experiments.operator_sensitivity.fit import behaviour, half_width, perform, step_time
from experiments.operator_sensitivity.operator import second_order_ok
from experiments.operator_sensitivity.runs import Run
from experiments.safety_taxonomy.variants import VARIANTS
from lightning_modules import MetaSeqClassifier
from theria.attention import registered_backend, scaled_dot_product_attention
from theria.curvature import as_backend, relative_difference
from theria.maml import meta_gradient
from theria.tasks.synthetic_seqcls import sample_tasks

pytestmark = [
    # what Lightning has to say about a trainer without workers
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]

SMALL = Run(
    inner_steps=2,
    seed=3,
    outer_steps=24,
    meta_batch=3,
    outer_lr=0.01,
    seq_len=6,
    width=8,
    num_classes=3,
    num_signal_positions=2,
    support_size=4,
    query_size=5,
)


def of_attention(gradients: dict) -> dict:
    return {name: g for name, g in gradients.items() if not name.startswith("head")}


def plain_loop(run: Run) -> dict[str, list]:
    """The same training without Lightning: losses, accuracies, norms, and FULL and FO gradients."""
    seed_everything(run.seed, verbose=False)
    model = MetaSeqClassifier(run.width, run.num_classes, backend="reference").model
    adam = torch.optim.Adam(model.parameters(), lr=run.outer_lr)
    found: dict[str, list] = {name: [] for name in ("loss", "accuracy", "norm_q", "full", "first")}
    for step in range(run.outer_steps):
        ids = torch.arange(run.meta_batch * step, run.meta_batch * (step + 1))
        batch = sample_tasks(run.spec, ids, seed=run.seed, epoch=0, stream="train")
        options = {"inner_steps": run.inner_steps, "inner_lr": run.inner_lr}
        results = {
            mode: meta_gradient(copy.deepcopy(model), batch[:2], batch[2:4], mode=mode, **options)
            for mode in ("FULL", "FO")
        }
        used = results[run.mode]
        found["loss"].append(used.loss.item())
        found["accuracy"].append(used.query_accuracy.item())
        found["norm_q"].append(used.grads["q_proj.weight"].norm().item())
        found["full"].append(results["FULL"].grads)
        found["first"].append(results["FO"].grads)
        for name, parameter in model.named_parameters():
            parameter.grad = used.grads[name]
        adam.step()
    return found


@pytest.mark.parametrize("mode", ["FULL", "FO"])
def test_figures_are_those_of_a_plain_loop(mode):
    run = dataclasses.replace(SMALL, mode=mode)
    row, curves = perform(run, "abc")
    expected = plain_loop(run)
    assert (row["status"], row["error"], row["commit"]) == ("OK", "", "abc")
    assert curves["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert row["final_acc"] == pytest.approx(np.mean(expected["accuracy"][-20:]), abs=1e-9)
    assert row["final_loss"] == pytest.approx(np.mean(expected["loss"][-20:]), rel=1e-5)
    assert row["attn_grad_norm_q"] == pytest.approx(np.mean(expected["norm_q"][-20:]), rel=1e-4)
    # measured before steps 0, 4, 8, ...
    probed = list(zip(expected["first"], expected["full"], strict=True))[:: 24 // fit.PROBES]
    differences = [relative_difference(first, full) for first, full in probed]
    local = [relative_difference(of_attention(first), of_attention(full)) for first, full in probed]
    assert row["rel_diff_full_vs_fo"] == pytest.approx(np.mean(differences), rel=1e-4)
    assert row["attn_rel_diff"] == pytest.approx(np.mean(local), rel=1e-4)
    assert row["attn_second_order_path"] == pytest.approx(1.0, abs=1e-4)
    assert row["attn_second_order_ok"] is True
    assert (row["dtype"], row["compute_dtype"], row["autocast"]) == ("float32", "float32", False)
    assert set(row) == set(COLUMNS)


def test_first_order_and_strict_agree_at_every_step():
    (_, first), (_, strict) = (perform(dataclasses.replace(SMALL, mode=m)) for m in ("FO", "FO_STRICT"))
    for name, values in first.items():
        np.testing.assert_allclose(strict[name], values, rtol=1e-6, err_msg=name)


def test_full_and_first_order_start_alike_and_part():
    (_, full), (_, first) = (perform(dataclasses.replace(SMALL, mode=m)) for m in ("FULL", "FO"))
    assert full["loss"][0] == first["loss"][0]
    assert full["loss"][-1] != first["loss"][-1]


def test_absorbed_projections_are_the_same_model():
    (_, plain), (_, absorbed) = (
        perform(dataclasses.replace(SMALL, absorb_projections=absorb)) for absorb in (False, True)
    )
    np.testing.assert_allclose(absorbed["loss"], plain["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    ("variant", "ok", "path"),
    [("raw_kernel_backward", False, 0.0), ("detach_attention_output", False, 0.0), ("checkpoint", True, 1.0)],
)
def test_second_order_is_asked_of_the_attention_that_trained(variant, ok, path):
    row, _ = perform(dataclasses.replace(SMALL, outer_steps=2, variant=variant))
    assert row["status"] == "OK", row["error"]
    assert row["attn_second_order_ok"] is ok
    assert row["attn_second_order_path"] == pytest.approx(path, abs=1e-3)


def test_custom_is_asked_too():
    row, _ = perform(dataclasses.replace(SMALL, outer_steps=2, backend="custom"))
    assert (row["status"], row["attn_second_order_ok"]) == ("OK", True)


@pytest.mark.parametrize("variant", ["baseline", "checkpoint"])
def test_second_order_is_asked_of_the_backend_of_the_run(variant):
    """Of a backend that loses curvature, not of the reference, with and without a wrapper around it."""
    broken = VARIANTS["detach_attention_output"].wrap(
        partial(scaled_dot_product_attention, backend="reference")
    )
    run = dataclasses.replace(SMALL, variant=variant, outer_steps=2)
    assert second_order_ok(run)
    with registered_backend("without curvature", as_backend(broken)) as name:
        lost = dataclasses.replace(run, backend=name)
        assert not second_order_ok(lost)
        row, _ = perform(lost)
    assert (row["status"], row["attn_second_order_ok"]) == ("OK", False), row["error"]


def test_a_partial_detach_is_not_ok():
    row, _ = perform(dataclasses.replace(SMALL, outer_steps=2, variant="detach_key"))
    assert row["attn_second_order_ok"] is False
    assert row["attn_second_order_path"] > 0.1


def test_first_order_runs_where_the_probe_cannot():
    row, _ = perform(dataclasses.replace(SMALL, outer_steps=2, mode="FO", variant="once_differentiable_sim"))
    assert row["status"] == "OK"
    assert row["attn_second_order_ok"] is False
    assert "probe" in row["error"]


@pytest.mark.parametrize("change", [{"variant": "no_grad_attention"}, {"variant": "?"}, {"backend": "?"}])
def test_a_run_that_fails_is_a_row(change):
    run = dataclasses.replace(SMALL, outer_steps=2, **change)
    row, curves = perform(run)
    assert row["status"] == "FAILED"
    assert row["error"]
    assert row["run_id"] == run.run_id
    assert row["final_acc"] == ""
    assert curves == {}


def test_a_run_that_diverges_says_so():
    row, _ = perform(dataclasses.replace(SMALL, inner_lr=1e30))
    assert row["status"] == "NON_FINITE"
    assert "outer step" in row["error"]


def test_training_that_ends_early_is_an_error(monkeypatch):
    monkeypatch.setattr(fit.Trainer, "fit", lambda *a, **k: None)
    row, _ = perform(SMALL)
    assert (row["status"], row["error"]) == ("FAILED", "RuntimeError: training ended at outer step 0 of 24")


def curves_of(loss: np.ndarray, accuracy: np.ndarray) -> dict[str, np.ndarray]:
    norms = {f"grad_norm_{g}": np.ones_like(loss) for g in ("q_proj", "k_proj", "v_proj", "head")}
    return {"loss": loss, "query_accuracy": accuracy, **norms}


def test_final_values_are_means_of_the_last_twenty_steps():
    accuracy = np.concatenate([np.zeros(80), np.linspace(0.5, 0.7, 20)])
    found = behaviour(curves_of(np.ones(100), accuracy))
    assert found["final_acc"] == pytest.approx(0.6)
    interval = stats.t.interval(0.95, 19, loc=0.6, scale=stats.sem(accuracy[-20:]))
    assert found["final_acc_ci95"] == pytest.approx(interval[1] - 0.6)
    assert found["convergence_delta"] == 0
    assert found["steps_to_90pct"] == ""


def test_ninety_percent_of_the_fall():
    # flat for 100 steps, straight down by 1 over 100, flat: the running mean has fallen by .9 at 190 + 9.5
    loss = np.concatenate([np.full(100, 2.0), np.linspace(2, 1, 101)[1:], np.full(100, 1.0)])
    found = behaviour(curves_of(loss, np.ones(300)))
    assert found["convergence_delta"] == pytest.approx(1.0)
    assert found["steps_to_90pct"] == 200


def test_a_vanished_attention_gradient_is_absent():
    curves = curves_of(np.ones(40), np.ones(40))
    assert behaviour(curves)["attn_grad_present"] is True
    for letter in "qkv":
        curves[f"grad_norm_{letter}_proj"] = np.full(40, 1e-12)
    assert behaviour(curves)["attn_grad_present"] is False


def test_probes_and_the_first_step_are_no_step_time():
    rows = [{"step_seconds": s} for s in (9.0, 1.0, 4.0, 1.0)]
    assert step_time(rows, [8.0, 3.0]) == pytest.approx(1.0)
    assert math.isnan(step_time(rows[:1], [8.0]))


def test_no_interval_of_one_value_or_of_infinity():
    assert math.isnan(half_width(np.array([1.0])))
    assert math.isnan(half_width(np.array([1.0, math.inf])))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["FULL", "FO", "FO_STRICT"])
def test_the_fused_kernels_train_as_the_reference_does(mode):
    runs = [
        dataclasses.replace(SMALL, mode=mode, backend=backend, width=16, device="cuda")
        for backend in ("reference", "triton_fused")
    ]
    (_, expected), (row, found) = (perform(run) for run in runs)
    assert (row["status"], row["attn_second_order_ok"]) == ("OK", True), row["error"]
    assert row["attn_second_order_path"] == pytest.approx(1.0, abs=1e-3)
    assert row["peak_cuda_mem_bytes"] > 0
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-3)
