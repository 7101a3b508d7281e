"""The accuracy study against a plain MAML loop on the same tasks and initial weights."""

import statistics

import pytest
import torch
from lightning.pytorch import seed_everything

from datamodules import SyntheticSeqCls
from experiments.meta_accuracy import LAST_STEPS, Run, train
from lightning_modules import MetaSeqClassifier
from theria.maml import meta_gradient
from theria.tasks.synthetic_seqcls import sample_tasks

pytestmark = [
    # what Lightning has to say about a trainer without logger, workers or validation
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]


def test_a_run_is_the_study_of_its_name():
    run = Run("FO", 1, seed=3, outer_steps=LAST_STEPS + 4)
    score = train(run, device="cpu", absorb_projections=True, test=False)
    seed_everything(3, verbose=False)
    model = MetaSeqClassifier(backend="reference", absorb_projections=True).model
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    accuracies = []
    for step in range(run.outer_steps):
        ids = torch.arange(16 * step, 16 * step + 16)
        batch = sample_tasks(SyntheticSeqCls().spec, ids, seed=3, epoch=0, stream="train")
        result = meta_gradient(model, batch[:2], batch[2:4], mode="FO", inner_steps=1, inner_lr=0.4)
        accuracies.append(result.query_accuracy.item())
        for name, parameter in model.named_parameters():
            parameter.grad = result.grads[name]
        adam.step()
    assert score.final_accuracy == pytest.approx(statistics.fmean(accuracies[-20:]), abs=1e-9)
