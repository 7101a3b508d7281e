"""Which heads of a language model do two tasks fight over?

    python -m experiments.interference --model RUN_DIRECTORY --task-a a.txt --task-b b.jsonl --out out
    python -m experiments.interference --model hf:DIRECTORY --task-a a.txt --task-b b.txt --out out
    python -m experiments.interference study --out docs/results/interference.md

The first two write arrays, tables, heat maps and report.md; the third trains two small models, measures the
variants of the score on them and writes the page of results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.interference.models import InputError
from theria.interference import VARIANTS
from theria.interference.fisher import FISHERS
from theria.interference.significance import CORRECTIONS

_STUDY = "study"


def parser() -> argparse.ArgumentParser:
    """The command line of one run."""
    found = argparse.ArgumentParser(
        prog="python -m experiments.interference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--model", required=True, help="checkpoint or run directory of MemoryLM, or hf:DIRECTORY")
    add("--task-a", type=Path, required=True, help="text, a sample a paragraph, or .jsonl, a sample a line")
    add("--task-b", type=Path, required=True, help="likewise")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--samples", type=_positive, default=32, help="of each task, the first of its file")
    add("--max-tokens", type=_positive, default=128, help="of a sample")
    add("--field", default="text", help="of a .jsonl file's objects")
    add("--tokenizer", help="byte, or a JSON file of the tokenizers package; the model's own by default")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add("--fisher", default="a", choices=FISHERS, help="task A's, or pooled over both")
    add("--ridge", default="relative", help="relative, absolute, floor or conditional, and :VALUE")
    add("--layers", type=int, nargs="+", help="numbers of layers; all by default")
    add("--blocks", help="letters among QKVO; all by default")
    add("--layout", help="JSON mapping that describes attention that is not known")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--memory-mib", type=float, default=2048, help="for gradients and scores, beside the model")
    add("--test", default="signed", choices=("", *VARIANTS), help="variant to test; '' for none")
    add("--level", type=_share, default=0.05, help="of the tests")
    add("--correction", default="bh", choices=CORRECTIONS, help="of the tests, for the number of heads")
    add("--permutations", type=_positive, help="of labels; as many as the level takes by default")
    add("--confidence", type=_share, default=0.95, help="of intervals")
    add("--resamples", type=_positive, default=2000, help="of the bootstrap")
    add("--seed", type=int, default=0, help="of permutations and resamples")
    add("--top", type=_positive, default=10, help="rows of the report's tables")
    return found


def _positive(given: str) -> int:
    if (value := int(given)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _share(given: str) -> float:
    if not 0 < (value := float(given)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def study_parser() -> argparse.ArgumentParser:
    """The command line of the study."""
    found = argparse.ArgumentParser(prog=f"python -m experiments.interference {_STUDY}")
    found.add_argument("--out", type=Path, default=Path("docs/results/interference.md"), help="page to write")
    found.add_argument("--steps", type=int, default=300, help="of training, of each model")
    found.add_argument("--samples", type=int, default=32, help="of each task")
    found.add_argument("--top", type=int, default=50, help="pairs whose overlap is measured")
    found.add_argument("--seed", type=int, default=0, help="of models, data and tests")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; None stands for the arguments of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [_STUDY]:
        from experiments.interference.study import study  # trains, and so imports far more

        print(study(study_parser().parse_args(given[1:])))
        return
    from experiments.interference.run import run

    args = parser().parse_args(given)
    try:
        print(run(args))
    except InputError as error:
        parser().error(str(error))


if __name__ == "__main__":
    main()
