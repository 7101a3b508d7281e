"""The pages and the reference build without a warning."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    built = subprocess.run(
        [*build, "docs", str(tmp_path)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "api" / "attention.html").read_text()
    assert "theria.attention.scaled_dot_product_attention" in reference
    assert "theria.attention.operators.AttentionOperators.second_jvp" in reference
