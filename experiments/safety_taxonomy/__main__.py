"""Break attention in every known way and see which diagnostics notice.

    python -m experiments.safety_taxonomy --backend all --steps 5 --inner-steps 1 5 10 20 --device cpu

writes a CSV, a picture and the device's section of a Markdown summary. Every variant is audited over every
backend; a variant that fails does not stop the others. On a CPU triton_fused runs under Triton's interpreter,
some 10 ms a tile, and therefore on two sequences and --interpreter-steps outer steps.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

BACKENDS = ("reference", "custom", "triton_fused")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.safety_taxonomy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", default="all", choices=("all", *BACKENDS))
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--steps", type=int, default=5, help="outer steps of MAML at each depth")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--interpreter-steps", type=int, default=1, help="outer steps under the interpreter")
    parser.add_argument(
        "--seeds", type=int, default=20, help="of the FULL-FO difference by depth; 0 leaves it out"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/safety_taxonomy.md"),
        help="Markdown file whose section of this device to write or renew; CSV and picture go beside it",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study."""
    args = parse(arguments)
    if args.device == "cpu":
        # read when the kernels are decorated, so it has to stand before theria is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from experiments.safety_taxonomy.study import run

    run(args, BACKENDS if args.backend == "all" else (args.backend,))


if __name__ == "__main__":
    main()
