"""The command line: python -m experiments.training_gates COMMAND."""

import argparse
from pathlib import Path

import torch

from experiments.training_gates import chunk_sizes, niah_frequency

RESULTS = Path("docs/results")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; None stands for the arguments of the process."""
    parser = argparse.ArgumentParser(prog="training_gates", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    chunks = commands.add_parser("chunk-sizes", help="measure the memory's chunk sizes and decide")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    chunks.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), default=devices)
    chunks.add_argument("--length", type=int, default=2048, help="tokens of a shard")
    chunks.add_argument("--dim", type=int, default=256, help="width of a memory head")
    chunks.add_argument("--rounds", type=int, default=5, help="measurements, of which the median counts")
    chunks.add_argument("--out", type=Path, default=RESULTS / "chunk_sizes.md", help="page to write")
    niah_frequency.add_command(commands)
    args = parser.parse_args(arguments)
    if args.command == "niah-frequency":
        report = niah_frequency.report(args)
    else:
        report = chunk_sizes.report(args.devices, length=args.length, dim=args.dim, rounds=args.rounds)
    print(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
