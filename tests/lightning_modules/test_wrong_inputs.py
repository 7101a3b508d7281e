"""Wrong input of every kind ends in one line that names it, with a status, and overwrites nothing."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_modules.cli import main
from lightning_modules.run_directory import LOCK_NAME

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
    pytest.mark.filterwarnings("ignore:The checkpoint was trained with:UserWarning"),
]

CONFIGS = Path(__file__).parents[2] / "configs"
RUN = Path("runs", "meta_seqcls", "version_0")
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_steps": 1,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
CALLBACKS = [{"class_path": name} for name in ("RNGState", "MetricsJSONL", "ResumableCheckpoint")]
META: dict[str, Any] = {
    "model": {"init_args": {"width": 6, "num_classes": 2, "inner_steps": 1}},
    "data": {
        "init_args": {
            "length": 5,
            "width": 6,
            "num_classes": 2,
            "num_signal_positions": 2,
            "support_size": 3,
            "query_size": 3,
            "meta_batch_size": 2,
            "train_tasks_per_epoch": 4,
        }
    },
    "trainer": QUIET | {"callbacks": CALLBACKS},
}
TEXT: dict[str, Any] = {
    "model": {"init_args": {"width": 16, "heads": 2, "memory_dim": 8, "window": 8, "sample_tokens": 0}},
    "data": {
        "init_args": {
            "domains": {"own": {"files": ["own/*.txt"]}},
            "sequence_length": 256,
            "batch_size": 2,
            "cache_dir": "cache",
        }
    },
    "trainer": QUIET | {"callbacks": CALLBACKS},
}
# what another process does that trains in a directory, until its input ends
HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
)
DOMAINS = "--data.init_args.domains"

# kind, job, options, what the line says
CASES = [
    ("config keys", "meta", ["--model.init_args.widht", "3"], "'widht' is not accepted"),
    ("config keys", "meta", ["--trainer.max_stepz", "3"], "--trainer.max_stepz"),
    ("config keys", "meta", ["--optimizer.lr", "1"], "unrecognized arguments: --optimizer.lr"),
    ("config keys", "text", ["--model.init_args.polarization.hol", "1"], "'hol' is not accepted"),
    ("config keys", "text", [DOMAINS, "{a: {fils: [a.txt]}}"], "'fils' is not accepted"),
    ("types", "meta", ["--model.init_args.width", "wide"], "width: Expected a int"),
    ("types", "meta", ["--trainer.max_steps", "many"], "trainer.max_steps: Expected a int"),
    ("types", "meta", ["--model", "MetaSeqClasifier"], "no class MetaSeqClasifier"),
    ("types", "meta", ["--trainer.callbacks+=EarlyStoping"], "no class EarlyStoping"),
    ("types", "meta", ["--trainer.precision", "17"], "trainer.precision: .*got 17"),
    ("types", "text", ["--model.init_args.dropout", "much"], "dropout: Expected a float.*much"),
    ("ranges", "meta", ["--model.init_args.width", "0"], "width must be a positive integer"),
    ("ranges", "meta", ["--model.init_args.gradient_clip_val", "0"], "must be positive or null, got 0"),
    ("ranges", "meta", ["--model.init_args.inner_steps", "-1"], "inner_steps .* at least 0, got -1"),
    ("ranges", "meta", ["--model.init_args.optimizer.init_args.lr", "-1"], "Invalid learning rate: -1.0"),
    ("ranges", "meta", ["--data.init_args.meta_batch_size", "0"], "meta_batch_size"),
    ("ranges", "meta", ["--trainer.max_steps", "-5"], "max_steps.*You passed in -5"),
    ("ranges", "meta", ["--trainer.limit_val_batches=-3"], "limit_val_batches"),
    ("ranges", "meta", ["--trainer.val_check_interval", "0"], "val_check_interval must not be 0"),
    ("ranges", "meta", ["--seed_everything", "-3"], "-3 is not in bounds"),
    ("ranges", "text", ["--model.init_args.chunk_size", "0"], "chunk_size must be a positive integer"),
    ("ranges", "text", ["--model.init_args.window", "0"], "window must be at least 2, received 0"),
    ("ranges", "text", ["--data.init_args.recall.share", "2"], r"share of recall must be in \[0, 1\], got 2"),
    ("missing files", "meta", ["--config", "nothing.yaml"], "nothing.yaml"),
    ("missing files", "meta", ["--ckpt_path", "nowhere"], "nowhere: there is no such run directory"),
    ("missing files", "meta", ["--ckpt_path", "last"], "name a run directory"),
    ("missing files", "text", [DOMAINS, "{a: {files: [nothing/*.txt]}}"], "no file matches 'nothing/"),
    (
        "missing files",
        "text",
        ["--data.init_args.tokenizer", "no.json"],
        "there is no tokenizer file no.json",
    ),
    (
        "incompatible options",
        "meta",
        ["--model.init_args.mode", "SECOND"],
        "'SECOND' is not one of FULL, FO, FO_STRICT",
    ),
    (
        "incompatible options",
        "meta",
        ["--trainer.gradient_clip_val", "1"],
        "gradient_clip_val has no effect.*set model.init_args.gradient_clip_val instead",
    ),
    (
        "incompatible options",
        "meta",
        ["--trainer.accumulate_grad_batches", "2"],
        "accumulate_grad_batches has no effect",
    ),
    (
        "incompatible options",
        "meta",
        ["--data.init_args.width", "9"],
        "width is 6 for MetaSeqClassifier and 9 for SyntheticSeqCls",
    ),
    (
        "incompatible options",
        "meta",
        [
            "--trainer.limit_val_batches=1",
            "--trainer.val_check_interval=9",
            "--trainer.check_val_every_n_epoch=1",
        ],
        "val_check_interval.*must be less",
    ),
    (
        "incompatible options",
        "meta",
        ["--data.init_args.num_classes", "4"],
        "num_classes is 2 for MetaSeqClassifier and 4",
    ),
    (
        "incompatible options",
        "meta",
        ["--trainer.val_check_interval", "00:00:00:01"],
        "val_check_interval",
    ),
    (
        "incompatible options",
        "meta",
        ["--trainer.callbacks+=AttentionGradLogger", "--trainer.callbacks.projections", "[other]"],
        "other",
    ),
    (
        "incompatible options",
        "meta",
        ["--trainer.strategy", "fully_sharded"],
        "MetaSeqClassifier cannot be divided by FullyShardedStrategy: set trainer.strategy to ddp",
    ),
    (
        "incompatible options",
        "text",
        ["--trainer.strategy", "fully_sharded", "--trainer.callbacks+=InterferenceHeatmap"],
        "InterferenceHeatmap reads whole parameters.*leave the callback out, or set trainer.strategy to ddp",
    ),
    (
        "incompatible options",
        "text",
        ["--trainer.strategy", "fully_sharded", "--trainer.callbacks+=AttentionGradLogger"],
        "AttentionGradLogger reads whole parameters.*leave the callback out, or set trainer.strategy to ddp",
    ),
    (
        "incompatible options",
        "text",
        ["--trainer.strategy", "fully_sharded", "--model.init_args.compile", "true"],
        "compile.*set model.compile to false, or trainer.strategy to ddp",
    ),
    (
        "incompatible options",
        "text",
        ["--trainer.strategy.class_path", "lightning.pytorch.strategies.ModelParallelStrategy"],
        "Lightning's ModelParallelStrategy.*take fully_sharded.*or ddp",
    ),
    (
        "incompatible options",
        "text",
        ["--model.init_args.vocab_size", "100"],
        "vocab_size is 100, but tokenizer 'byte' makes 449",
    ),
    (
        "incompatible options",
        "text",
        ["--model.init_args.heads", "3"],
        "width must be an even number a head, received width 16, heads 3",
    ),
    (
        "incompatible options",
        "text",
        ["--data.init_args.batch_size", "3"],
        "train_sequences_per_epoch = 8000 is not a multiple of batch_size = 3",
    ),
    ("GPU without one", "meta", ["--config", str(CONFIGS / "trainer" / "gpu.yaml")], "no GPU is usable"),
    ("GPU without one", "meta", ["--trainer.accelerator", "cuda"], "no GPU is usable: take cpu or auto"),
    (
        "GPU without one",
        "meta",
        ["--trainer.accelerator", "gpu", "--trainer.precision", "16-mixed"],
        "no GPU is usable",
    ),
    ("GPU without one", "text", ["--model.init_args.kernel", "fla"], "they run on CUDA devices, not on cpu"),
    ("bad data", "text", [DOMAINS, "{a: {files: [bad.jsonl], field: t}}"], "bad.jsonl:1 is not JSON"),
    ("bad data", "text", [DOMAINS, "{a: {files: [other.jsonl], field: t}}"], "no field 't', it has 'u'"),
    ("bad data", "text", [DOMAINS, "{a: {files: [bytes.bin]}}"], "bytes.bin is not UTF-8: byte 0xff"),
    (
        "bad data",
        "text",
        ["--data.init_args.tokenizer", "bad.json"],
        "bad.json is not a file of the tokenizers",
    ),
    ("bad data", "text", [DOMAINS, "{a: {files: [empty.text]}}"], "none of its 0 documents"),
    ("bad data", "text", [DOMAINS, "{a: {built_in: wikipedia}}"], "python_docs, python_sources.*wikipedia"),
    ("wrong checkpoint", "meta", ["--ckpt_path", str(RUN), "--model.init_args.width", "4"], "width is 4 for"),
    (
        "wrong checkpoint",
        "meta",
        ["--ckpt_path", str(RUN), "--model.init_args.width", "4", "--data.init_args.width", "4"],
        r"model.q_proj.weight has the shape \(6, 6\) in it and \(4, 4\) as configured",
    ),
    (
        "wrong checkpoint",
        "text",
        ["--ckpt_path", str(RUN)],
        "beside MemoryLM as configured it lacks model.* and has model.q_proj.weight",
    ),
    ("wrong checkpoint", "meta", ["--ckpt_path", "weights.ckpt"], "weights.ckpt"),
    ("wrong checkpoint", "meta", ["--ckpt_path", "a.txt"], "a.txt"),
    ("corrupt checkpoint", "meta", ["--ckpt_path", "cut.ckpt"], "cut.ckpt"),
    ("corrupt checkpoint", "meta", ["--ckpt_path", "empty.ckpt"], "empty.ckpt"),
    ("corrupt checkpoint", "meta", ["--ckpt_path", "noise.ckpt"], "noise.ckpt"),
    ("corrupt checkpoint", "meta", ["--ckpt_path", "ruined"], "none of the checkpoints"),
    ("occupied directory", "meta", ["--save_dir", "a.txt"], "a.txt"),
    ("occupied directory", "meta", ["--name", "../a.txt"], "a.txt"),
    ("occupied directory", "meta", ["--ckpt_path", "busy"], "busy"),
    ("occupied directory", "text", ["--data.init_args.cache_dir", "a.txt"], "a.txt"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a run, and with all that is wrong."""
    where = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setattr("sys.argv", ["theria"])
        Path("meta.yaml").write_text(yaml.safe_dump(META))
        Path("text.yaml").write_text(yaml.safe_dump(TEXT))
        Path("a.txt").touch()
        Path("own").mkdir()
        for number in range(60):
            Path("own", f"{number}.txt").write_text(f"Words of document {number} stand here.\n\n" * 30)
        Path("bad.jsonl").write_text("{bad\n")
        Path("other.jsonl").write_text('{"u": "x"}\n')
        Path("bytes.bin").write_bytes(b"\xff\xfe\x00\x80" * 50)
        Path("bad.json").write_text("{}")
        Path("empty.text").touch()
        main(["fit", "--config", str(CONFIGS / "meta_seqcls.yaml"), "--config", "meta.yaml"])
        (good,) = (RUN / "checkpoints").glob("*.ckpt")
        torch.save({"a": torch.zeros(2)}, "weights.ckpt")
        Path("cut.ckpt").write_bytes(good.read_bytes()[:-200])
        Path("empty.ckpt").touch()
        Path("noise.ckpt").write_bytes(bytes(range(256)) * 20)
        shutil.copytree(RUN, "ruined")
        (Path("ruined", "checkpoints") / good.name).write_bytes(b"")
        shutil.copytree(RUN, "busy")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, where / "busy" / LOCK_NAME],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield where
        other.communicate()


def contents(directory: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != LOCK_NAME
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU some of this is no wrong input")
@pytest.mark.parametrize(
    ("job", "options", "message"),
    [case[1:] for case in CASES],
    ids=[f"{kind}: {' '.join(options)}"[:80] for kind, _, options, _ in CASES],
)
def test_it_ends_in_one_line_and_overwrites_nothing(
    place: Path,
    job: str,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["theria"])
    before = contents(place)
    base = {"meta": "meta_seqcls.yaml", "text": "memory_lm.yaml"}[job]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", str(CONFIGS / base), "--config", f"{job}.yaml", *options])
    said = capsys.readouterr().err
    assert left.value.code not in (0, None)
    (line,) = (line for line in said.splitlines() if line.startswith("theria: error: "))
    assert re.search(message, line), line
    assert "Traceback" not in said
    after = contents(place)
    assert {path: after.get(path) for path in before} == before


def test_every_kind_is_there() -> None:
    kinds = [kind for kind, *_ in CASES]
    assert len(kinds) >= 40
    assert all(kinds.count(kind) >= 4 for kind in kinds)
    assert len(set(kinds)) == 10
