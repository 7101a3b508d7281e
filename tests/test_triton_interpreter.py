"""Kernel functions that call others compute the same where the language is replaced once a launch."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402  # after what skips
from triton.runtime import interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter")


@triton.jit
def largest(values):
    return tl.max(tl.abs(values), axis=0)


@triton.jit
def scaled(input, output, size: tl.constexpr):
    place = tl.arange(0, size)
    values = tl.load(input + place)
    tl.store(output + place, values / largest(values))


def test_inner_calls_replace_nothing_and_a_launch_leaves_the_language_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_up = []
    replace_builtins = interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda *args: looked_up.append(args[0]) or replace_builtins(*args)
    )
    values, output = torch.tensor([1.0, -4.0, 2.0, 0.0]), torch.empty(4)
    counts = []
    for _ in range(3):
        scaled[(1,)](values, output, 4)
        assert output.tolist() == [0.25, -1.0, 0.5, 0.0]
        assert tl.core.is_builtin(tl.load)
        counts.append(looked_up.count(tl))
        looked_up.clear()
    assert counts == [1, 1, 1]
