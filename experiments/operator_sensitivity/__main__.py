"""``python -m experiments.operator_sensitivity``, see `experiments.operator_sensitivity.cli`."""

import sys

from experiments.operator_sensitivity.cli import main

if __name__ == "__main__":
    sys.exit(main())
