"""Decisions and exit gates of memory-language-model training.

    python -m experiments.training_gates [--device cuda] [--steps 1000]
    python -m experiments.training_gates chunk-sizes
    python -m experiments.training_gates niah-frequency

Without a command all gates G2-1 to G2-8 are measured: a line each, then how many passed. The status is 1 if
any falls short.
"""

import argparse
import sys
from pathlib import Path

import torch

from experiments.training_gates import chunk_sizes, niah_frequency, runner

RESULTS = Path("docs/results")
CHUNK_PAGE = RESULTS / "chunk_sizes.md"
FREQUENCY_PAGE = RESULTS / "niah_frequency.md"
CONFIGS = {"cpu": Path("configs/memory_lm.yaml"), "cuda": Path("configs/memory_lm_60m.yaml")}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; None stands for the arguments of the process."""
    parser = argparse.ArgumentParser(
        prog="training_gates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_gates(parser)
    commands = parser.add_subparsers(dest="command")
    _add_chunk_sizes(commands.add_parser("chunk-sizes", help="measure the memory's chunk sizes and decide"))
    niah_frequency.add_command(commands)
    args = parser.parse_args(arguments)
    if args.command is None:
        sys.exit(_measure_gates(args))
    if args.command == "niah-frequency":
        report = niah_frequency.report(args)
    else:
        report = chunk_sizes.report(args.devices, length=args.length, dim=args.dim, rounds=args.rounds)
    print(report)
    _write(args.out, report)


def _add_gates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument(
        "--config", type=Path, nargs="+", help="of the training, and overlays; memory_lm or memory_lm_60m"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/training_gates"), help="directory of runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_gates.md", help="page to write")


def _add_chunk_sizes(chunks: argparse.ArgumentParser) -> None:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    chunks.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), default=devices)
    chunks.add_argument("--length", type=int, default=2048, help="tokens of a shard")
    chunks.add_argument("--dim", type=int, default=256, help="width of a memory head")
    chunks.add_argument("--rounds", type=int, default=5, help="measurements, of which the median counts")
    chunks.add_argument("--out", type=Path, default=CHUNK_PAGE, help="page to write")


def _measure_gates(args: argparse.Namespace) -> int:
    options = runner.Options(
        configs=tuple(args.config or [CONFIGS[args.device]]),
        device=args.device,
        steps=args.steps,
        work=args.work,
        chunk_page=CHUNK_PAGE,
        frequency_page=FREQUENCY_PAGE,
    )
    options.work.mkdir(parents=True, exist_ok=True)
    found = []
    for gate in runner.outcomes(options):
        print(gate, flush=True)
        found.append(gate)
    print(runner.summary(found))
    _write(args.out, runner.page(found, options))
    return 0 if all(gate.passed for gate in found) else 1


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
