"""``python -m experiments.operator_sensitivity``, see `experiments.operator_sensitivity.cli`."""

import os
import sys
from collections.abc import Sequence

import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    if not torch.cuda.is_available():
        # read when the kernels are decorated, so it has to stand before theria is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from experiments.operator_sensitivity import cli

    return cli.main(list(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
