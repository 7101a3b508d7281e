"""Every generator is saved as tensors and primitives and comes back exactly."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from callbacks import RNGState
from callbacks.rng_state import collect_rng_state, set_rng_state
from lightning_modules.checkpoint_io import check_primitive


def draw() -> tuple[Any, ...]:
    numbers: tuple[Any, ...] = (
        [random.random(), random.gauss(0, 1)],
        np.random.rand(2).tolist(),  # noqa: NPY002  # the global generator is what is saved
        np.random.standard_normal(3).tolist(),  # noqa: NPY002
        torch.randn(3).tolist(),
    )
    if torch.cuda.is_available():
        numbers += tuple(torch.rand(2, device=f"cuda:{i}").tolist() for i in range(torch.cuda.device_count()))
    return numbers


@pytest.fixture
def disturbed() -> None:
    """Generators in the middle of things: gaussians come in pairs, of which one is kept for the next call."""
    draw()


@pytest.mark.usefixtures("disturbed")
def test_generators_come_back(tmp_path: Path) -> None:
    state = collect_rng_state()
    expected = [draw(), draw()]
    check_primitive(state)
    torch.save(state, tmp_path / "state")
    draw()
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert [draw(), draw()] == expected


@pytest.mark.gpu
def test_cuda_generators_come_back() -> None:
    torch.rand(3, device="cuda")
    state = collect_rng_state()
    assert len(state["cuda"]) == torch.cuda.device_count()
    expected = torch.rand(5, device="cuda").tolist()
    set_rng_state(state)
    assert torch.rand(5, device="cuda").tolist() == expected


def trainer(**changes: Any) -> Any:
    options = {"global_rank": 0, "world_size": 1, "enable_validation": False}
    return SimpleNamespace(**(options | changes))


def resumed(state: dict[str, Any], trainer: Any) -> RNGState:
    callback = RNGState()
    callback.load_state_dict(state)
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    return callback


@pytest.mark.usefixtures("disturbed")
def test_what_others_draw_at_the_start_of_training_is_undone() -> None:
    state = RNGState().state_dict()
    expected = draw()
    callback = resumed(state, trainer())
    draw()
    callback.on_train_batch_start(trainer(), None, None, 0)  # type: ignore[arg-type]
    assert draw() == expected
    callback.on_train_batch_start(trainer(), None, None, 1)  # type: ignore[arg-type]
    assert draw() != expected


@pytest.mark.usefixtures("disturbed")
def test_each_rank_gets_its_own() -> None:
    first = collect_rng_state()
    draw()
    second = collect_rng_state()
    expected = draw()
    resumed({"ranks": [first, second]}, trainer(global_rank=1, world_size=2))
    assert draw() == expected


@pytest.mark.usefixtures("disturbed")
def test_another_number_of_processes_is_told() -> None:
    state = {"ranks": [collect_rng_state()]}
    before = draw()
    with pytest.warns(UserWarning, match="of 1 processes and this run has 2"):
        callback = resumed(state, trainer(global_rank=1, world_size=2))
    assert draw() != before
    callback.on_train_batch_start(trainer(global_rank=1, world_size=2), None, None, 0)  # type: ignore[arg-type]
