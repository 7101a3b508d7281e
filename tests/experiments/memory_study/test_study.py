"""The study end to end in small, and its parts: equal sizes, schedules of any length, xz."""

import json
import lzma
import random
from pathlib import Path

import pytest
import torch
import yaml

from experiments.memory_study.__main__ import main
from experiments.memory_study.compress import xz_bits_per_byte
from experiments.memory_study.train import _sizes, matching_hidden, model_settings, of_length
from theria.models.memory_lm import MemoryLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name", ["memory_lm", "memory_lm_60m"])
def test_attention_alone_gets_as_many_parameters(name):
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
    sizes = _sizes(given)
    hidden = matching_hidden(given)
    with torch.device("meta"):
        models = [
            MemoryLM(given["vocab_size"], **sizes),
            MemoryLM(given["vocab_size"], **{**sizes, "memory_heads": 0, "mlp_hidden": hidden}),
        ]
    whole, alone = (sum(p.numel() for p in model.parameters()) for model in models)
    assert alone == pytest.approx(whole, rel=5e-3)
    assert hidden % 8 == 0


def test_later_files_and_arguments_decide(tmp_path):
    for name, settings in (("a", {"width": 1, "blocks": 2}), ("b", {"width": 3})):
        (tmp_path / name).write_text(yaml.safe_dump({"model": {"init_args": settings}}))
    paths = [tmp_path / "a", tmp_path / "b"]
    assert model_settings(paths, []) == {"width": 3, "blocks": 2}
    assert model_settings(paths, ["--model.init_args.width", "4"])["width"] == 4


def test_all_schedules_get_the_length():
    given = {
        "lr_scheduler": {"init_args": {"total_steps": 1000, "warmup_steps": 50}},
        "polarization": {"steps": 1000},
    }
    arguments = of_length(80, given, "memory")
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert pairs == {
        "--trainer.max_steps": "80",
        "--trainer.val_check_interval": "8",
        "--model.init_args.lr_scheduler.init_args.total_steps": "80",
        "--model.init_args.lr_scheduler.init_args.warmup_steps": "20",
        "--model.init_args.polarization.steps": "80",
    }
    assert "--model.init_args.polarization.steps" not in of_length(80, given, "no_polarization")


def test_xz_has_the_whole_training_text_at_hand():
    noise = random.Random(0)
    training = noise.randbytes(200_000)
    seen, new = (xz_bits_per_byte(training, text) for text in (training[:20_000], noise.randbytes(20_000)))
    assert seen < 0.3
    assert new == pytest.approx(8, rel=0.1)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**26}]
    size = [len(lzma.compress(text, filters=filters)) for text in (training, training + training[:20_000])]
    assert seen == pytest.approx(8 * (size[1] - size[0]) / 20_000, abs=0.05)


@pytest.mark.slow
def test_a_page_of_two_variants(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["memory_study"])
    for name in ("prose", "sources"):
        for number in range(40):
            text = "\n\n".join(f"{name} {number} of {line * number}" for line in range(9))
            Path(f"{name}{number}.txt").write_text(text)
    overlay = {
        "model": {
            "init_args": {
                "width": 16,
                "heads": 2,
                "window": 6,
                "memory_dim": 8,
                "slots": 4,
                "chunk_size": 8,
                "sample_tokens": 0,
            }
        },
        "data": {
            "init_args": {
                "domains": {
                    name: {"built_in": None, "files": [f"{name}*.txt"]} for name in ("prose", "sources")
                },
                "sequence_length": 64,
                "batch_size": 4,
                "train_sequences_per_epoch": 400,
                "val_sequences": 4,
                "recall": {
                    "min_pairs": 2,
                    "max_pairs": 4,
                    "queries": 2,
                    "query_span": 8,
                    "num_val_sequences": 4,
                },
                "val_fraction": 0.2,
                "test_fraction": 0.2,
                "cache_dir": "cache",
            }
        },
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 1, "enable_model_summary": False},
    }
    Path("small.yaml").write_text(yaml.safe_dump(overlay))
    config = ["--config", str(CONFIGS / "memory_lm.yaml"), "small.yaml", "--work", "work"]
    main([*config, "--variants", "memory", "--minutes", "0.01", "--out", "page.md"])
    main([*config, "--variants", "attention", "--out", "page.md"])
    memory, attention = (
        json.loads(Path(f"work/{name}.json").read_text()) for name in ("memory", "attention")
    )
    assert memory["steps"] == attention["steps"] >= 1
    assert attention["parameters"] == pytest.approx(memory["parameters"], rel=0.05)
    assert not attention["shares"]
    assert len(memory["history"]) >= 1
    page = Path("page.md").read_text()
    for name, figures in (("prose", memory), ("sources", attention)):
        assert f"{figures['figures'][f'test/{name}_bits_per_byte']:.3f}" in page
    for line in ("| key never stored |", "| stored in the previous shard |", "| memory switched off |"):
        assert line in page
