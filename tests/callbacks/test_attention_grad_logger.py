import math
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from callbacks import AttentionGradLogger

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers:UserWarning"
    ),  # a few numbers need no workers
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]

WIDTH, STEPS = 3, 7


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(WIDTH, WIDTH)
        self.k_proj = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x)) * torch.sin(self.k_proj(x)))


class TwoBlocks(LightningModule):
    """Two blocks under manual or automatic optimisation; keeps every step's gradients."""

    def __init__(self, manual: bool = True, scale: float = 1.0, used: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.first, self.second = Block(), Block()
        self.scale = scale
        self.used = used
        self.gradients: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.scale * self.second(self.first(batch[0])).square().mean()
        if self.used:
            loss = sum(p.square().sum() for name, p in self.named_parameters() if name in self.used)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append(
            {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def norm(self, step: int, part: str) -> float:
        entries = [
            entry
            for name, gradient in self.gradients[step].items()
            if part in name
            for entry in gradient.double().flatten().tolist()
        ]
        return math.sqrt(sum(entry * entry for entry in entries))


def fit(module: LightningModule, logger: Any, *callbacks: AttentionGradLogger, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        max_epochs=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = torch.linspace(-1, 1, 2 * STEPS * WIDTH).reshape(-1, WIDTH)
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=2))
    return trainer


def events(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("manual", [True, False])
def test_norms_and_histograms_are_those_of_the_gradients(tmp_path: Path, manual: bool) -> None:
    logger, module = TensorBoardLogger(tmp_path, name="", version=""), TwoBlocks(manual)
    fit(module, logger, AttentionGradLogger(every_n_steps=3))
    read = events(tmp_path)
    for part in ("q_proj", "k_proj", "v_proj"):
        scalars = read.Scalars(f"grad/{part}")
        assert [event.step for event in scalars] == [2, 5]
        expected = [module.norm(step, part) for step in (2, 5)]
        assert [event.value for event in scalars] == pytest.approx(expected, rel=1e-6)
        histograms = read.Histograms(f"grad/{part}_histogram")
        assert [event.step for event in histograms] == [2, 5]
        for event in histograms:
            gradients = [g for name, g in module.gradients[event.step].items() if part in name]
            entries = torch.cat([gradient.flatten() for gradient in gradients]).double()
            assert event.histogram_value.num == entries.numel()
            assert event.histogram_value.min == pytest.approx(entries.min().item())
            assert event.histogram_value.max == pytest.approx(entries.max().item())
            assert event.histogram_value.sum_squares == pytest.approx(entries.square().sum().item())
    assert len(read.Tags()["scalars"]) == 3
    assert len(read.Tags()["histograms"]) == 3


def test_projections_are_any_parts_of_names(tmp_path: Path) -> None:
    logger, module = TensorBoardLogger(tmp_path, name="", version=""), TwoBlocks()
    fit(module, logger, AttentionGradLogger(every_n_steps=4, projections=["first.v_proj", "bias"]))
    read = events(tmp_path)
    assert sorted(read.Tags()["scalars"]) == ["grad/bias", "grad/first.v_proj"]
    for part in ("first.v_proj", "bias"):
        (event,) = read.Scalars(f"grad/{part}")
        assert event.value == pytest.approx(module.norm(3, part), rel=1e-6)


def test_values_share_the_axis_of_self_log(tmp_path: Path) -> None:
    class Logging(TwoBlocks):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.log("beside", 1.0)

    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(Logging(), logger, AttentionGradLogger(every_n_steps=1))
    read = events(tmp_path)
    assert [e.step for e in read.Scalars("grad/q_proj")] == [e.step for e in read.Scalars("beside")]


def test_steps_in_between_compute_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    gradients = AttentionGradLogger._gradients

    def watch(callback: AttentionGradLogger, module: TwoBlocks, optimizer: Any) -> dict[str, Tensor]:
        asked.append(len(module.gradients))
        return gradients(callback, module, optimizer)

    monkeypatch.setattr(AttentionGradLogger, "_gradients", watch)
    fit(TwoBlocks(), CSVLogger(tmp_path), AttentionGradLogger(every_n_steps=3, histograms=False))
    assert asked == [2, 5]


def test_without_tensorboard_histograms_are_off_with_one_warning(tmp_path: Path) -> None:
    callback, module = AttentionGradLogger(every_n_steps=3), TwoBlocks()
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="no TensorBoard logger, so histograms are off"):
        fit(module, logger, callback)
    fit(TwoBlocks(), CSVLogger(tmp_path), callback)
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    assert list(logged["step"]) == [2, 5]
    expected = [module.norm(step, "q_proj") for step in (2, 5)]
    assert list(logged["grad/q_proj"]) == pytest.approx(expected, rel=1e-6)


def test_a_projection_without_parameters_is_an_error_before_training() -> None:
    module = TwoBlocks()
    module.second.k_proj.requires_grad_(False)
    message = r"no trainable parameter of TwoBlocks has \['out_proj', 'second.k'\] in its name.*first\.q_proj"
    with pytest.raises(ValueError, match=message):
        fit(module, False, AttentionGradLogger(projections=("q_proj", "out_proj", "second.k")))
    assert module.gradients == []


def test_a_projection_without_gradients_is_left_out_with_one_warning(tmp_path: Path) -> None:
    logger, module = (
        TensorBoardLogger(tmp_path, name="", version=""),
        TwoBlocks(used=("first.q_proj.weight",)),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, logger, AttentionGradLogger(every_n_steps=1))
    said = [str(warning.message) for warning in caught if "AttentionGradLogger" in str(warning.message)]
    assert said == [
        f"AttentionGradLogger: no gradient reaches {part}, grad/{part} is left out"
        for part in ("k_proj", "v_proj")
    ]
    read = events(tmp_path)
    assert read.Tags()["scalars"] == ["grad/q_proj"]
    assert read.Scalars("grad/q_proj")[0].value == pytest.approx(module.norm(0, "q_proj"), rel=1e-6)


def test_an_optimiser_that_trains_no_projection_is_passed_over(tmp_path: Path) -> None:
    class TwoOptimizers(TwoBlocks):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            head_optimizer, optimizer = self.optimizers()
            loss = (self.head * self.second(self.first(batch[0]))).square().mean()
            head_optimizer.zero_grad()
            optimizer.zero_grad()
            self.manual_backward(loss)
            head_optimizer.step()
            optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            blocks = [p for name, p in self.named_parameters() if name != "head"]
            return [torch.optim.SGD([self.head], lr=0.01), torch.optim.SGD(blocks, lr=0.01)]

    fit(
        TwoOptimizers(),
        TensorBoardLogger(tmp_path, name="", version=""),
        AttentionGradLogger(every_n_steps=3),
    )
    assert [event.step for event in events(tmp_path).Scalars("grad/q_proj")] == [2, 5]


def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_breaks_nothing(tmp_path: Path) -> None:
    logger, module = TensorBoardLogger(tmp_path, name="", version=""), TwoBlocks()
    # the bias gets finite gradients, the weights get NaN
    module.first.q_proj.weight.register_hook(lambda gradient: gradient * math.nan)
    module.second.q_proj.weight.register_hook(lambda gradient: gradient * math.nan)
    module.first.k_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    module.second.k_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = AttentionGradLogger(every_n_steps=1, projections=["q_proj", "k_proj"])
        fit(module, logger, callback, max_steps=1)
    said = [str(warning.message) for warning in caught if "AttentionGradLogger" in str(warning.message)]
    assert [message.split(" is ")[0] for message in said] == [
        "AttentionGradLogger: the gradient of q_proj",
        "AttentionGradLogger: the gradient of k_proj",
    ]
    read = events(tmp_path)
    assert math.isnan(read.Scalars("grad/q_proj")[0].value)
    assert read.Scalars("grad/k_proj")[0].value == math.inf
    assert read.Tags()["histograms"] == ["grad/q_proj_histogram"]
    assert read.Histograms("grad/q_proj_histogram")[0].histogram_value.num == 2 * WIDTH


def test_a_half_precision_norm_is_taken_in_float32(tmp_path: Path) -> None:
    module, logger = TwoBlocks(scale=300.0), TensorBoardLogger(tmp_path, name="", version="")
    module.to(torch.bfloat16)
    fit(module, logger, AttentionGradLogger(every_n_steps=1), precision="bf16-true")
    values = [event.value for event in events(tmp_path).Scalars("grad/q_proj")]
    assert values == pytest.approx([module.norm(step, "q_proj") for step in range(STEPS)], rel=1e-5)


def test_fast_dev_run_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(TwoBlocks(), CSVLogger(tmp_path), AttentionGradLogger(every_n_steps=1), fast_dev_run=True)
    assert not [warning for warning in caught if "AttentionGradLogger" in str(warning.message)]


@pytest.mark.parametrize("projections", ["q_proj", (), ("q_proj", "")])
def test_projections_are_checked(projections: Any) -> None:
    with pytest.raises(ValueError, match="projections must list parts of parameter names"):
        AttentionGradLogger(projections=projections)
