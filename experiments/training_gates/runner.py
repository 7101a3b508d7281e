"""All exit gates one after the other, and their page."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml
from torch import Tensor

from benchmarks.report import markdown_table, provenance
from callbacks import NIAHProbe, PPLDeltaRollback, read_metrics
from experiments.training_gates import chunk_sizes, niah_frequency
from experiments.training_gates.forced_spike import run_with_spike, spike_gate
from experiments.training_gates.gate import Gate
from experiments.training_gates.locked_chunks import chunk_gate
from experiments.training_gates.needle_recall import needle_gate
from experiments.training_gates.probe_overhead import overhead_gate
from experiments.training_gates.shard_boundary import boundary_gate, measure_boundary
from experiments.training_gates.shard_start import measure_shard_start, shard_start_gate
from experiments.training_gates.stable_training import stability_gate
from experiments.training_gates.telemetry import telemetry_gate
from experiments.training_gates.trained import STOPS, Trained, merged, train

_SEQUENCES = 2
_CHUNK_LENGTH = {"cpu": 256, "cuda": 2048}
_CHUNK_ROUNDS = 3
_PROBES, _STEPS_BETWEEN = 8, 4


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured where.

    Attributes:
        configs: of the training, the later ones overlays.
        device: "cpu" or "cuda".
        steps: of the long run.
        work: directory of the runs.
        chunk_page: page of the decision on chunk sizes.
        frequency_page: page of the decision on how often needles are probed.
        chunk_dim: width of a memory head in its new measurement.
    """

    configs: tuple[Path, ...]
    device: str
    steps: int
    work: Path
    chunk_page: Path
    frequency_page: Path
    chunk_dim: int = 256


Measure = Callable[[Options, Trained], Gate]


def outcomes(options: Options) -> Iterator[Gate]:
    """Train, then measure the gates in their order; each is handed out as soon as it is known."""
    run: Trained | None = None
    try:
        run = train(
            options.configs, [], steps=options.steps, device=options.device, work=options.work, name="stable"
        )
    except STOPS as error:
        ended = f"training ended with {type(error).__name__}: {error}"
    for name, measure in GATES.items():
        if run is None:
            yield Gate(name, ended, "training ends by itself", False)
            continue
        try:
            yield measure(options, run)
        except STOPS as error:
            yield Gate(name, f"{type(error).__name__}: {error}", "no such end", False)


def page(found: Sequence[Gate], options: Options) -> str:
    """Markdown of all outcomes."""
    rows = [
        [gate.name, gate.title, gate.measured, gate.bar, "passed" if gate.passed else "**failed**"]
        for gate in found
    ]
    return "\n".join(
        [
            f"# Exit gates of training: {options.configs[0].stem}",
            "",
            provenance("experiments.training_gates"),
            f"**{summary(found)}**",
            "",
            *markdown_table(["gate", "what", "measured", "bar", ""], rows),
            "",
        ]
    )


def summary(found: Sequence[Gate]) -> str:
    """How many of all gates passed."""
    return f"{sum(gate.passed for gate in found)}/{len(GATES)}"


def _chunks(options: Options, run: Trained) -> Gate:
    length = _CHUNK_LENGTH[options.device]
    measured = chunk_sizes.measure(options.device, length=length, dim=options.chunk_dim, rounds=_CHUNK_ROUNDS)
    tolerance = chunk_sizes.TOLERANCE[options.device]
    decided = _text(options.chunk_page)
    return chunk_gate(decided, measured, tolerance=tolerance, configured=run.module.hparams["chunk_size"])


def _overhead(options: Options, run: Trained) -> Gate:
    config = options.work / "as_configured.yaml"
    config.write_text(yaml.safe_dump(merged(options.configs)), encoding="utf-8")
    cost = niah_frequency.measure(options.device, config, probes=_PROBES, between=_STEPS_BETWEEN)
    configured = run.callback(NIAHProbe).every_n_steps
    return overhead_gate(_text(options.frequency_page), cost, configured=configured)


def _shard_start(options: Options, run: Trained) -> Gate:
    return shard_start_gate(measure_shard_start(run.module.model, _tokens(run), run.precision))


def _stability(options: Options, run: Trained) -> Gate:
    table = read_metrics(run.directory / "metrics.jsonl")
    return stability_gate(table, run.module, steps=options.steps, seconds=run.seconds)


def _needles(options: Options, run: Trained) -> Gate:
    probe = run.callback(NIAHProbe)
    with run.precision():
        return needle_gate(probe.probe(options.steps))


def _spike(options: Options, run: Trained) -> Gate:
    return spike_gate(run_with_spike(options.configs, device=options.device, work=options.work))


def _telemetry(options: Options, run: Trained) -> Gate:
    settings = run.settings(PPLDeltaRollback)
    # the name "loss" stands for what training_step returned, which is the sum of all losses
    loss = "total_loss" if settings["monitor"] == "loss" else settings["monitor"]
    return telemetry_gate(
        read_metrics(run.directory / "metrics.jsonl"),
        steps=options.steps,
        loss=loss,
        threshold=settings["threshold"],
        baseline_steps=settings["baseline_steps"],
    )


def _boundary(options: Options, run: Trained) -> Gate:
    found = measure_boundary(run.module.model, _tokens(run), reach=run.module.reach, precision=run.precision)
    return boundary_gate(found)


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8") if page.exists() else ""


def _tokens(run: Trained) -> Tensor:
    """A few sequences of validation text."""
    batch = next(iter(run.data.val_dataloader()[0]))
    tokens: Tensor = batch.tokens[:_SEQUENCES].to(run.module.device)
    return tokens


GATES: dict[str, Measure] = {
    "G2-1": _chunks,
    "G2-2": _overhead,
    "G2-3": _shard_start,
    "G2-4": _stability,
    "G2-5": _needles,
    "G2-6": _spike,
    "G2-7": _telemetry,
    "G2-8": _boundary,
}
