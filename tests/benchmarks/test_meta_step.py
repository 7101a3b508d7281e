"""The peer of every published ratio, and the ways beside it, compute one and the same meta-gradient."""

import pytest
import torch

from benchmarks.meta_step import INNER_LR, contenders, draw, looped_meta_gradient
from theria.maml import MetaMode, meta_gradient
from theria.models.seq_classifier import SeqClassifier


@pytest.fixture(scope="module")
def models() -> tuple[SeqClassifier, SeqClassifier]:
    torch.manual_seed(0)
    plain = SeqClassifier(64, 5, backend="reference")
    absorbed = SeqClassifier(64, 5, backend="reference", absorb_projections=True)
    absorbed.load_state_dict(plain.state_dict())
    return plain, absorbed


@pytest.mark.parametrize("mode", [MetaMode.FULL, MetaMode.FO])
def test_all_contenders_agree(models, mode):
    data = draw(3, torch.device("cpu"))
    ways = contenders(*models, data, mode=mode, inner_steps=2)
    expected = looped_meta_gradient(models[0], *data, mode=mode, inner_steps=2)
    single = meta_gradient(models[0], *data, mode=mode, inner_steps=2, inner_lr=INNER_LR).grads
    assert set(ways) == {"loop", "unrolled", "unrolled, absorbed", "sweep", "sweep, absorbed"}
    for name, way in ways.items():
        result = way()
        gradients = result if isinstance(result, dict) else result.grads
        for key, value in expected.items():
            assert (gradients[key] - value).norm() <= 2e-6 * value.norm(), (name, key)
            assert (single[key] - value).norm() <= 2e-6 * value.norm()


def test_a_sweep_is_a_sweep(models):
    ways = contenders(*models, draw(1, torch.device("cpu")), mode=MetaMode.FULL, inner_steps=1)
    assert ways["sweep"].keywords["strategy"] == ways["sweep, absorbed"].keywords["strategy"] == "sweep"
