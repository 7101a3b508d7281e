"""The benchmark of the memory: its peers compute the same, and every section is written."""

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import per_token_projection, projection_inputs
from benchmarks.plain_transformer import PlainTransformer, plain_peer
from theria.memory import causal_projection


def test_the_loop_computes_what_the_chunks_compute():
    q, k, m, norm = (part.double() for part in projection_inputs(150, 8, "cpu"))
    expected = causal_projection(q, k, m, norm)[0]
    torch.testing.assert_close(per_token_projection(q, k, m, norm), expected, rtol=1e-10, atol=1e-10)


def test_the_peer_is_of_the_asked_size_and_causal():
    peer = plain_peer(60_000, vocab=50, width=32, blocks=3, heads=2)
    assert sum(p.numel() for p in peer.parameters()) == pytest.approx(60_000, abs=4 * 3 * 32 * 3)
    tokens = torch.randint(50, (2, 12))
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 50
    before, after = peer(tokens), peer(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_the_peers_operations_are_those_of_its_products():
    model = PlainTransformer(50, width=32, blocks=2, heads=2, hidden=24)
    weights = 50 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 24)
    # a token of three sees one, two or three keys
    assert model.training_flops_per_token(3) == 3 * (2 * weights + 2 * 4 * 32 * 2)


@pytest.mark.slow
def test_the_page_has_every_section(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    sizes = ["--dims", "8", "--length", "64", "--longest", "4096", "--batch", "1", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["memory", *sizes, "--out", str(page)])
    memory.main()
    text = page.read_text()
    for title in ("Projection against a loop over tokens", "Growth with length", "Training"):
        assert f"## {title}" in text
    assert "Fitted exponent of the length" in text
