"""The decision by agreement and then by speed, and the page that holds it."""

import pytest

from experiments.training_gates.__main__ import main
from experiments.training_gates.chunk_sizes import Measurement, default_of, locked_set, measure


def measurement(chunk, seconds, difference):
    return Measurement(chunk, "tensor", seconds, 0, difference)


def test_the_fastest_of_those_that_agree_is_the_default():
    found = [measurement(8, 3.0, 0.0), measurement(16, 1.0, 1e-2), measurement(32, 2.0, 1e-4)]
    assert locked_set(found, 1e-4) == (8, 32)
    assert default_of(found, (8, 32)) == 32
    with pytest.raises(ValueError, match="no chunk size agrees"):
        default_of(found, ())


def test_every_candidate_reads_the_same_numbers():
    found = measure("cpu", length=70, dim=8, rounds=1)
    assert [m.chunk_size for m in found] == [8, 16, 32, 64]
    assert all(0 < m.difference < 1e-5 for m in found)
    assert all(m.seconds > 0 and m.peak_bytes > 0 for m in found)


def test_the_page_names_set_and_default(tmp_path, capsys):
    page = tmp_path / "docs" / "chunks.md"
    options = ["--devices", "cpu", "--length", "64", "--dim", "8", "--rounds", "1", "--out", str(page)]
    main(["chunk-sizes", *options])
    text = page.read_text()
    assert "Locked set: {8, 16, 32, 64}. Default: **" in text
    assert text in capsys.readouterr().out
