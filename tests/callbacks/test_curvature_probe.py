"""What the probe reports, that training does not notice it, and what it says of attention that fails."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from callbacks import CurvatureProbe
from callbacks.rng_state import collect_rng_state
from datamodules import SyntheticSeqCls
from lightning_modules import MetaSeqClassifier
from theria.attention import register_backend, scaled_dot_product_attention
from theria.attention import registry as attention_registry
from theria.curvature import as_backend, relative_difference, second_order_path
from theria.maml import meta_gradient
from theria.tasks.synthetic_seqcls import SeqClsSpec, sample_tasks

SIZES = {
    "length": 6,
    "width": 8,
    "num_classes": 3,
    "num_signal_positions": 2,
    "support_size": 4,
    "query_size": 5,
}
REFERENCE = partial(scaled_dot_product_attention, backend="reference")

pytestmark = [
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # the tests are about numbers, not about how many processes read the data
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, prefix: str) -> list[tuple[int, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if any(name.startswith(prefix) for name in row)]


class Watcher(Callback):
    """Weights, gradients and generators after every step, and the parameters that a probe at its end sees."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []
        self.models: list[torch.nn.Module] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        model = pl_module.model
        self.models.append(copy.deepcopy(model))
        state = collect_rng_state()  # of which Python's is drawn from by the tests' own shape checks
        self.seen.append(
            [
                *(p.detach().clone() for p in model.parameters()),
                *(p.grad.clone() for p in model.parameters()),
                state["torch"],
                state["numpy"][0],
                torch.tensor([state["numpy"][1]]),
            ]
        )


def fit(*callbacks: Callback, steps: int = 6, data: Any = None, trainer: Any = None, **changes: Any):
    seed_everything(0, verbose=False)
    options = {"width": 8, "num_classes": 3, "inner_steps": 2, "backend": "reference"} | changes
    module = MetaSeqClassifier(**options)
    logger = Memory()
    data = data or SyntheticSeqCls(**SIZES, meta_batch_size=4, train_tasks_per_epoch=32)
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        inference_mode=False,
        use_distributed_sampler=False,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        **(trainer or {}),
    ).fit(module, datamodule=data)
    return module, logger


def test_training_is_bit_identical_with_and_without_it():
    alone, probed = Watcher(), Watcher()
    _, without = fit(alone)
    _, logged = fit(probed, CurvatureProbe(every_n_steps=2))
    # the state after a step that was probed is seen before the next step
    _, _ = fit(CurvatureProbe(every_n_steps=1), after := Watcher())
    for other in (probed, after):
        assert len(alone.seen) == len(other.seen) == 6
        for expected, found in zip(alone.seen, other.seen, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    timings = {"perf/step_seconds"}
    for (step, expected), (other_step, found) in zip(without.of("train/"), logged.of("train/"), strict=True):
        assert step == other_step
        assert {n: v for n, v in expected.items() if n not in timings} == {
            n: v for n, v in found.items() if n not in timings
        }


def test_it_reports_every_n_steps_on_the_axis_of_the_step():
    _, logger = fit(CurvatureProbe(every_n_steps=2, tasks=2), steps=5)
    assert [step for step, _ in logger.of("curvature/")] == [1, 3]
    trained = [step for step, row in logger.rows if "train/loss" in row]
    assert set(trained) >= {1, 3}


@pytest.fixture
def backends():
    """Names under which attention is registered for one test."""
    before = dict(attention_registry._registered)
    yield lambda name, attend: register_backend(name, as_backend(attend))
    attention_registry._registered.clear()
    attention_registry._registered.update(before)


@pytest.mark.parametrize(("backend", "sound"), [("reference", True), ("custom", True), ("queryless", False)])
def test_its_numbers_are_those_of_the_library(backend, sound, backends):
    def queryless(query, key, value, *, is_causal=False):
        return REFERENCE(query.detach() + 0 * query, key, value, is_causal=is_causal)

    backends("queryless", queryless)
    watcher = Watcher()
    module, logger = fit(watcher, CurvatureProbe(every_n_steps=3, tasks=2, seed=5), steps=3, backend=backend)
    ((_, row),) = logger.of("curvature/")
    (model,) = watcher.models[2:]
    batch = sample_tasks(SeqClsSpec(**SIZES), torch.arange(2), seed=5, epoch=0, stream="validation")
    full, first = (
        meta_gradient(model, batch[:2], batch[2:4], mode=mode, inner_steps=2, inner_lr=0.4).grads
        for mode in ("FULL", "FO")
    )
    reference = copy.deepcopy(model).double()
    reference.backend = "reference"
    modules = ("q_proj", "k_proj", "v_proj")
    path = second_order_path(model, reference, batch[:2], modules=modules, seed=5)
    assert row["curvature/rel_diff"] == relative_difference(first, full)
    own = [{name: g[name] for name in g if not name.startswith("head")} for g in (first, full)]
    assert row["curvature/attn_rel_diff"] == relative_difference(*own)
    assert row["curvature/attn_magnitude"] == pytest.approx(path.magnitude, rel=1e-9)
    assert (abs(row["curvature/attn_magnitude"] - 1) < 1e-3) == sound
    assert 0.01 < row["curvature/rel_diff"] < 2
    assert all(p.grad is not None for p in module.model.parameters())


def test_the_adapted_modules_are_those_of_the_module():
    watcher = Watcher()
    _, logger = fit(watcher, CurvatureProbe(every_n_steps=1), steps=1, adapt=["head"])
    ((_, row),) = logger.of("curvature/")
    batch = sample_tasks(SeqClsSpec(**SIZES), torch.arange(4), seed=0, epoch=0, stream="validation")
    options = {"inner_steps": 2, "inner_lr": 0.4, "adapt": ["head"]}
    full, first = (
        meta_gradient(watcher.models[0], batch[:2], batch[2:4], mode=mode, **options).grads
        for mode in ("FULL", "FO")
    )
    assert row["curvature/rel_diff"] == relative_difference(first, full)


def test_its_cost_is_logged():
    _, logger = fit(CurvatureProbe(every_n_steps=2), steps=4)
    rows = [row for _, row in logger.of("curvature/")]
    assert all(0 < row["curvature/probe_seconds"] < 10 for row in rows)
    assert all(0 < row["curvature/probe_share"] < 1 for row in rows)


def test_lost_curvature_is_warned_of_once(backends):
    def detached(query, key, value, *, is_causal=False):
        out = REFERENCE(query, key, value, is_causal=is_causal)
        return out.detach() + 0 * out

    backends("detached", detached)
    with pytest.warns(UserWarning, match=r"at step 1 the attention has 0\.0% of its curvature") as said:
        _, logger = fit(CurvatureProbe(every_n_steps=1), steps=3, backend="detached")
    assert sum("CurvatureProbe" in str(w.message) for w in said) == 1
    rows = [row for _, row in logger.of("curvature/")]
    assert [row["curvature/attn_magnitude"] for row in rows] == [0, 0, 0]
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_second_order_that_raises_is_warned_of_and_first_order_training_goes_on(backends):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, cotangent):
            return cotangent

    backends("once", lambda q, k, v, *, is_causal=False: Once.apply(REFERENCE(q, k, v)))
    watcher, plain = Watcher(), Watcher()
    with pytest.warns(UserWarning, match=r"raises at step 1, so that.*once_differentiable") as said:
        _, logger = fit(watcher, CurvatureProbe(every_n_steps=1), steps=3, mode="FO", backend="once")
    assert sum("CurvatureProbe" in str(w.message) for w in said) == 1
    assert logger.of("curvature/") == []
    fit(plain, steps=3, mode="FO")
    for found, expected in zip(watcher.seen, plain.seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_it_measures_in_the_precision_of_training():
    _, single = fit(CurvatureProbe(every_n_steps=1), steps=1)
    _, mixed = fit(CurvatureProbe(every_n_steps=1), steps=1, trainer={"precision": "bf16-mixed"})
    _, double = fit(CurvatureProbe(every_n_steps=1), steps=1, trainer={"precision": "64-true"})
    found = [logger.of("curvature/")[0][1]["curvature/attn_magnitude"] for logger in (single, mixed, double)]
    errors = [abs(value - 1) for value in found]
    assert errors[2] < 1e-12 < errors[0] < 1e-4 < errors[1] < 0.1


class Other(LightningModule):
    """A module without a classifier."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training must not begin")

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


def test_modules_and_data_without_what_it_measures_are_refused_before_training():
    trainer = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, **trainer}
    data = SyntheticSeqCls(**SIZES, meta_batch_size=4, train_tasks_per_epoch=8)
    with pytest.raises(MisconfigurationException, match="Other has none: leave the callback out"):
        Trainer(callbacks=[CurvatureProbe()], **options).fit(Other(), datamodule=data)
    module = MetaSeqClassifier(width=8, num_classes=3)
    loaders = (data.train_dataloader(), data.val_dataloader())
    with pytest.raises(MisconfigurationException, match="NoneType has none: leave the callback out"):
        Trainer(callbacks=[CurvatureProbe()], inference_mode=False, **options).fit(module, *loaders)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"every_n_steps": 0}, ValueError), ({"every_n_steps": 1.5}, TypeError), ({"tasks": 0}, ValueError)],
)
def test_impossible_settings_are_refused(options, error):
    with pytest.raises(error):
        CurvatureProbe(**options)
