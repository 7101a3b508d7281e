"""TensorBoard as a run leaves it: every chart lives, the server answers, a browser sees it."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from forked_runs import Run, in_forks
from tensorboard.backend.application import TensorBoardWSGIApp
from tensorboard.backend.event_processing.data_ingester import LocalDataIngester
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.program import TensorBoard
from werkzeug.test import Client

from callbacks import Dashboard, InterferenceHeatmap, read_metrics, run_card
from callbacks.charts import Bands, Lines, layout_summary
from callbacks.dashboard import charts_of, hyper_parameters
from lightning_modules.cli import main

pytestmark = [
    pytest.mark.slow,
    # Lightning's own use of torch.utils._pytree, from torch 2.13 on
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # Lightning's cli.py calls jsonargparse by names that are going away
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
    # what a model of a few steps is told
    pytest.mark.filterwarnings("ignore:(NIAHProbe|the gates have failed):UserWarning"),
]

REPOSITORY = Path(__file__).parents[2]
STEPS = 4
JOBS = ("meta_seqcls", "memory_lm")
ADDED = {"Dashboard", "RunCard", "InnerStepCurves"}
SMALLER: dict[str, dict[str, dict[str, Any]]] = {
    "meta_seqcls": {"model": {"inner_steps": 2}, "data": {"val_tasks": 4, "meta_batch_size": 4}},
    "memory_lm": {
        "model": {"width": 16, "heads": 2, "window": 8, "memory_dim": 8, "slots": 4, "sample_tokens": 4},
        "data": {"batch_size": 2, "val_sequences": 2},
    },
}


def shortened(name: str, corpus: Path) -> dict[str, Any]:
    """A shipped configuration in which everything happens within four small steps."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())
    for part, changes in SMALLER[name].items():
        config[part]["init_args"] |= changes
    if name == "memory_lm":
        data = config["data"]["init_args"]
        data["cache_dir"] = str(corpus / "cache")
        data["recall"]["num_val_sequences"] = 2
        data["domains"] = {part: {"files": [f"{corpus}/{part}*.txt"]} for part in ("prose", "sources")}
    config["trainer"] |= {
        "max_steps": STEPS,
        "val_check_interval": 2,
        "log_every_n_steps": 2,
        "accelerator": "cpu",
        "enable_model_summary": False,
    }
    for entry in config["trainer"]["callbacks"]:
        given = entry.get("init_args", {})
        if "every_n_steps" in given:
            given["every_n_steps"] = 2
        if entry["class_path"] == "GateMonitor":
            given |= {"baseline_step": 1, "check_from": 2}
        if entry["class_path"] == "NIAHProbe":
            given |= {"prompts": 2, "repetitions": 2, "capacity": [10]}
    return config


def fit(
    directory: Path, name: str, corpus: Path, *, leave_out: set[str] = frozenset(), **trainer: Any
) -> Path:
    """Train as the command line does; the run directory."""
    config = shortened(name, corpus)
    config["trainer"] |= trainer
    listed = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [entry for entry in listed if entry["class_path"] not in leave_out]
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    before = set(directory.glob("runs/*/version_*"))
    main(["fit", "--config", str(file), "--save_dir", str(directory / "runs")])
    (run,) = set(directory.glob("runs/*/version_*")) - before
    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for part in ("prose", "sources"):
        for number in range(40):
            words = " ".join(f"{part} {number * line}" for line in range(60))
            (folder / f"{part}{number}.txt").write_text(words)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """A run of each module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["theria"])
        return {name: fit(tmp_path_factory.mktemp(name), name, corpus) for name in JOBS}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["theria"])


def events_of(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


def layout_in(events: EventAccumulator) -> layout_pb2.Layout:
    newest = events.Tensors(metadata.CONFIG_SUMMARY_TAG)[-1]
    return layout_pb2.Layout.FromString(newest.tensor_proto.string_val[0])


def patterns(layout: layout_pb2.Layout) -> list[str]:
    """What every line and band of the charts looks for, as TensorBoard understands it."""
    charts = [chart for category in layout.category for chart in category.chart]
    bands = [tag for c in charts for s in c.margin.series for tag in (s.value, s.lower, s.upper)]
    return [tag for c in charts for tag in c.multiline.tag] + [f"{re.escape(tag)}$" for tag in bands]


def server(logdir: Path) -> Client:
    """TensorBoard's application in this process, with everything loaded."""
    program = TensorBoard()
    argv = [None, "--logdir", str(logdir), "--load_fast=false", "--reload_task=blocking"]
    program.configure(argv=[*argv, "--reload_interval=0"])
    ingester = LocalDataIngester(program.flags)
    ingester.start()
    parts = (program.plugin_loaders, ingester.data_provider, program.assets_zip_provider)
    return Client(TensorBoardWSGIApp(program.flags, *parts, ingester.deprecated_multiplexer))


def asked(client: Client, path: str, **query: str) -> Any:
    answer = client.get(f"/data/plugin/{path}", query_string=query)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.data)


def cards(client: Client) -> list[Any]:
    """Of the only run."""
    (run,) = asked(client, "scalars/tags")
    shown: list[Any] = asked(client, "text/text", run=run, tag="run/card/text_summary")
    return shown


@pytest.mark.parametrize("name", JOBS)
def test_no_chart_is_dead(runs: dict[str, Path], name: str) -> None:
    events = events_of(runs[name])
    tags = events.Tags()["scalars"]
    wanted = patterns(layout_in(events))
    assert len(wanted) > 15
    assert [pattern for pattern in wanted if not any(re.match(pattern, tag) for tag in tags)] == []


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        (
            "meta_seqcls",
            {
                *(
                    f"val/query_accuracy{which}{end}"
                    for which in ("", "_before")
                    for end in ("", "_low", "_high")
                ),
                *(f"val/query_accuracy_step_{step:02d}" for step in range(3)),
                *("curvature/rel_diff", "grad/q_proj", "grad/k_proj", "grad/v_proj"),
            },
        ),
        (
            "memory_lm",
            {
                *("train/loss", "train/perplexity", "val/bits_per_byte", "val/sources_bits_per_byte"),
                *("rollback/ppl_delta", "rollback/spike", "rollback/count", "gate/mean", "gate/token_std"),
                *("niah/accuracy_depth_1", "niah/accuracy_depth_4", "niah/cosine_low", "niah/accuracy"),
                *("niah/accuracy_memory_off", "val/recall_accuracy", "val/recall_accuracy_memory_off"),
            },
        ),
    ],
)
def test_what_people_look_at_is_charted(runs: dict[str, Path], name: str, tags: set[str]) -> None:
    wanted = patterns(layout_in(events_of(runs[name])))
    assert {tag for tag in tags if not any(re.match(pattern, tag) for pattern in wanted)} == set()
    # and nothing comes along by its beginning alone
    assert not any(re.match(pattern, "val/query_accuracy_before_of_another") for pattern in wanted)


def test_intervals_are_of_the_tasks(runs: dict[str, Path]) -> None:
    events = events_of(runs["meta_seqcls"])

    def newest(tag: str) -> float:
        return events.Scalars(f"val/query_accuracy{tag}")[-1].value

    assert newest("_low") == pytest.approx(newest("") - newest("_ci95"))
    assert newest("_high") == pytest.approx(newest("") + newest("_ci95"))
    assert newest("_before_low") < newest("_before") < newest("_before_high")
    assert newest("_before") == newest("_step_00")
    assert newest("") == newest("_step_02")


@pytest.mark.parametrize(
    ("name", "images", "histograms"),
    [
        ("meta_seqcls", {"val/inner_steps"}, {f"grad/{part}_proj_histogram" for part in "qkv"}),
        ("memory_lm", {"niah/heat_map", "niah/capacity"}, set()),
    ],
)
def test_figures_are_there(runs: dict[str, Path], name: str, images: set[str], histograms: set[str]) -> None:
    events = events_of(runs[name])
    assert set(events.Tags()["images"]) == images
    assert set(events.Tags()["histograms"]) == histograms
    assert all([image.step for image in events.Images(tag)] == [1, 3] for tag in images)


@pytest.mark.parametrize(
    ("name", "metric"), [("meta_seqcls", "val/query_accuracy"), ("memory_lm", "val/bits_per_byte")]
)
def test_the_server_answers(runs: dict[str, Path], name: str, metric: str) -> None:
    client = server(runs[name].parent)
    (run,) = asked(client, "scalars/tags")
    points = asked(client, "scalars/scalars", run=run, tag=metric)
    assert [step for _, step, _ in points] == [1, 3]

    layout = asked(client, "custom_scalars/layout")
    titles = [chart["title"] for category in layout["category"] for chart in category["chart"]]
    assert len(titles) == len(set(titles)) >= 8
    for category in layout["category"]:
        for chart in category["chart"]:
            for pattern in chart.get("multiline", {}).get("tag", []):
                assert asked(client, "custom_scalars/scalars", run=run, tag=pattern)["tag_to_events"], pattern

    tag = {"meta_seqcls": "val/inner_steps", "memory_lm": "niah/heat_map"}[name]
    image = asked(client, "images/images", run=run, tag=tag, sample="0")[-1]
    assert client.get(f"/data/plugin/images/individualImage?{image['query']}").data.startswith(b"\x89PNG")

    (card,) = cards(client)
    assert "<td>reference (configured: auto)</td>" in card["text"]

    asking = {"experimentName": "", "startIndex": 0, "sliceSize": 10, "colParams": []}
    asking["allowedStatuses"] = ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING"]
    answer = client.post("/data/plugin/hparams/session_groups", json=asking)
    (group,) = json.loads(answer.data)["sessionGroups"]
    assert group["hparams"]["max_steps"] == STEPS
    assert group["hparams"]["learning_rate"] == {"meta_seqcls": 0.001, "memory_lm": 0.003}[name]
    (value,) = group["metricValues"]
    assert value["name"]["tag"] == metric
    assert value["value"] == points[-1][2]


@pytest.mark.parametrize("name", JOBS)
def test_no_value_is_made_up_for_the_metric(runs: dict[str, Path], name: str) -> None:
    events = events_of(runs[name])
    assert "hp_metric" not in events.Tags()["scalars"]
    metric = {"meta_seqcls": "val/query_accuracy", "memory_lm": "val/bits_per_byte"}[name]
    assert [event.step for event in events.Scalars(metric)] == [1, 3]


@pytest.mark.parametrize("name", JOBS)
def test_training_is_bit_for_bit_the_same_without(
    runs: dict[str, Path], name: str, corpus: Path, tmp_path: Path
) -> None:
    bare = fit(tmp_path, name, corpus, leave_out=ADDED)
    assert not events_of(bare).Tags()["tensors"] or name == "memory_lm"  # its samples of text
    records = []
    for run in (runs[name], bare):
        state = torch.load(run / "checkpoints" / "step_000004.ckpt", weights_only=True)
        table = read_metrics(run / "metrics.jsonl").drop(columns=["timestamp", "step_seconds"])
        records.append((state["state_dict"], state["callbacks"], table))
    (weights, states, table), (bare_weights, bare_states, bare_table) = records
    assert weights.keys() == bare_weights.keys()
    assert all(torch.equal(weights[part], bare_weights[part]) for part in weights)
    assert table.equals(bare_table)
    assert states.keys() == bare_states.keys()  # nothing to restore: they may join a run or leave it
    torch.testing.assert_close(states["RNGState"], bare_states["RNGState"], rtol=0, atol=0)


def test_a_resumed_run_has_one_layout_and_a_card_of_each_start(corpus: Path, tmp_path: Path) -> None:
    run = fit(tmp_path, "meta_seqcls", corpus)
    layout = asked(server(run.parent), "custom_scalars/layout")
    for steps in (6, 8):
        main(["fit", "--ckpt_path", str(run), "--trainer.max_steps", str(steps)])
    assert [event.step for event in events_of(run).Scalars("val/query_accuracy")] == [1, 3, 5, 7]
    client = server(run.parent)
    assert [card["step"] for card in cards(client)] == [0, 4, 6]
    assert asked(client, "custom_scalars/layout") == layout
    # two runs side by side share their charts
    fit(tmp_path, "meta_seqcls", corpus, max_steps=2)
    assert asked(server(run.parent), "custom_scalars/layout") == layout


def test_a_resume_from_before_the_first_checkpoint_keeps_the_layout(corpus: Path, tmp_path: Path) -> None:
    """TensorBoard hides what was written at its step and later, which is everything."""
    run = fit(tmp_path, "meta_seqcls", corpus)
    for path in (run / "checkpoints").glob("*.ckpt"):
        if path.name != "rollback_000000.ckpt":
            path.unlink()
    main(["fit", "--ckpt_path", str(run)])
    client = server(run.parent)
    assert len(asked(client, "custom_scalars/layout")["category"]) == 4
    assert [card["step"] for card in cards(client)] == [0]


def test_charts_that_a_short_run_would_not_fill_are_left_out(corpus: Path, tmp_path: Path) -> None:
    run = fit(tmp_path, "meta_seqcls", corpus, val_check_interval=5, max_steps=3)
    events = events_of(run)
    wanted = patterns(layout_in(events))
    assert wanted
    assert not any(pattern.startswith("val/") for pattern in wanted)
    tags = events.Tags()["scalars"]
    assert [pattern for pattern in wanted if not any(re.match(pattern, tag) for tag in tags)] == []
    run = fit(tmp_path, "meta_seqcls", corpus, leave_out={"CurvatureProbe"}, max_steps=2)
    assert not any(pattern.startswith("curvature/") for pattern in patterns(layout_in(events_of(run))))


def test_charts_without_a_memory_or_recall(corpus: Path, tmp_path: Path) -> None:
    config = shortened("memory_lm", corpus)
    config["model"]["init_args"] |= {"memory_heads": 0, "sample_tokens": 0, "vocab_size": 257}
    config["data"]["init_args"]["recall"] = None
    listed = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [entry for entry in listed if entry["class_path"] != "NIAHProbe"]
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "alone.yaml"), "--save_dir", str(tmp_path / "runs")])
    (run,) = tmp_path.glob("runs/*/version_0")
    events = events_of(run)
    titles = [category.title for category in layout_in(events).category]
    assert titles == ["Language model", "Health"]
    tags = events.Tags()["scalars"]
    assert all(any(re.match(pattern, tag) for tag in tags) for pattern in patterns(layout_in(events)))


def test_only_rank_zero_writes(corpus: Path, tmp_path: Path) -> None:
    config = shortened("meta_seqcls", corpus)
    config["trainer"] |= {"devices": 2, "strategy": "ddp", "limit_val_batches": 1}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", str(tmp_path / "two.yaml"), "--save_dir", str(tmp_path / "runs")]
    in_forks(tmp_path, [Run("two", arguments, processes=2)])
    (file,) = (tmp_path / "runs").rglob("events.out*")
    events = events_of(file.parent)
    assert len(events.Tensors(metadata.CONFIG_SUMMARY_TAG)) == 1
    (card,) = events.Tensors("run/card/text_summary")
    assert b"| device | 2 x cpu" in card.tensor_proto.string_val[0]
    assert [image.step for image in events.Images("val/inner_steps")] == [1, 3]


def test_other_ranks_are_not_even_asked() -> None:
    trainer: Any = SimpleNamespace(is_global_zero=False)
    Dashboard("val/loss").on_train_start(trainer, None)  # type: ignore[arg-type]
    card = run_card.RunCard()
    card.on_train_start(trainer, None)  # type: ignore[arg-type]
    card.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]


def test_a_module_of_one_s_own_may_tell_nothing(tmp_path: Path) -> None:
    module: Any = SimpleNamespace(hparams={"a": {"b": 1, "c": None}, "flag": True, "_class_path": "x"})
    trainer: Any = SimpleNamespace(
        callbacks=[Dashboard("val/loss"), InterferenceHeatmap()], max_steps=-1, optimizers=[], precision=32
    )
    assert charts_of(trainer, module) == []
    found = hyper_parameters(trainer, module)
    found.pop("seed_everything", None)
    assert found == {"a/b": 1, "a/c": "None", "flag": "True", "max_steps": -1, "precision": "32"}


def test_charts_beyond_the_end_are_left_out() -> None:
    told = [Lines("a", "now", ("x",), 10), Lines("a", "never", ("y",), float("inf")), Bands("b", "z", (), 11)]
    module: Any = SimpleNamespace(charts=lambda trainer: told)

    def kept(max_steps: int) -> list[str]:
        trainer: Any = SimpleNamespace(callbacks=[], max_steps=max_steps)
        return [chart.title for chart in charts_of(trainer, module)]

    assert (kept(9), kept(10), kept(11)) == ([], ["now"], ["now", "z"])
    assert kept(-1) == ["now", "z"]


def test_a_layout_keeps_categories_together_and_whole_tags() -> None:
    told = [
        Lines("one", "first", ("a/b", r"c/\d+")),
        Bands("two", "second", (("v", "l", "u"),)),
        Lines("one", "third", ("d",)),
    ]
    (value,) = layout_summary(told).value
    layout = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    assert [category.title for category in layout.category] == ["one", "two"]
    assert [chart.title for chart in layout.category[0].chart] == ["first", "third"]
    assert list(layout.category[0].chart[0].multiline.tag) == ["a/b$", r"c/\d+$"]
    (series,) = layout.category[1].chart[0].margin.series
    assert (series.value, series.lower, series.upper) == ("v", "l", "u")
    assert value.metadata.plugin_data.plugin_name == "custom_scalars"


@pytest.fixture(scope="module")
def screenshots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("screenshots", REPOSITORY / "docs" / "screenshots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def browser(screenshots: ModuleType) -> Iterator[Any]:
    pytest.importorskip("playwright", reason="needs the extra theria[screenshots]")
    if not any(shutil.which(name) for name in screenshots.BROWSERS):
        pytest.skip("needs Chromium or Chrome")
    with screenshots.browser() as opened:
        yield opened


# the server's threads and sockets end with the process
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", JOBS)
def test_a_browser_sees_the_charts(
    runs: dict[str, Path], name: str, browser: Any, screenshots: ModuleType, tmp_path: Path
) -> None:
    with screenshots.served(runs[name].parent) as address:
        page = next(page for page in screenshots.PAGES if page.name == name)
        titles, lines = screenshots.photograph(browser, address, page, tmp_path / "page.png")
    events = events_of(runs[name])
    first = layout_in(events).category[0]
    assert {chart.title for chart in first.chart} <= set(titles)
    assert lines >= 2 * len(first.chart)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_runs_of_the_pictures_are_of_the_shipped_configurations(
    screenshots: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("lightning_modules.cli.main", called.append)
    (tmp_path / "meta_seqcls").mkdir()  # is there, so it is not trained
    screenshots.train(tmp_path)
    (command,) = called
    assert command[-2:] == ["--name", "memory_lm"]
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["theria"])
    with pytest.raises(SystemExit) as left:
        main([*command, "--print_config"])
    assert left.value.code == 0
