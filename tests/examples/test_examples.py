"""Every example runs, and shows what it says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_kernel_is_audited(capsys: pytest.CaptureFixture[str]) -> None:
    example("audit_your_kernel").main()
    said = capsys.readouterr().out
    assert "sound: SAFE" in said
    assert "launched: SILENT_COLLAPSE" in said


def test_a_model_is_meta_trained(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("second_order_maml").main(steps=21)
    assert losses[-1] < losses[0] - 0.1
    assert "|FULL - FO| / |FULL| = 0.4" in capsys.readouterr().out


def test_a_run_heals() -> None:
    healed, hurt = example("watch_a_run_heal").main()
    assert healed == pytest.approx(0.09, rel=0.1)  # the noise of the points, 0.3 squared
    assert hurt > 1


def test_datasets_fight() -> None:
    state = torch.random.get_rng_state()
    found = example("where_datasets_fight").main()
    torch.random.set_rng_state(state)
    scores = [score for *_, score in found]
    assert scores == sorted(scores)
    assert sum(score < 0 for score in scores) > len(scores) / 2


def test_all_are_run() -> None:
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in tested
