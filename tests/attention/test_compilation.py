"""What compiles when: together, beforehand in the background, and once."""

import threading
from types import SimpleNamespace

import pytest
import torch

from theria.attention.kernels import compilation
from theria.attention.kernels.compilation import Job, compiled

CPU = torch.device("cpu")


class Kernel:
    """Notes in which thread it is compiled, once ``gate`` opens, and how often."""

    def __init__(self, gate=None, error=None):
        self.gate, self.error, self.threads = gate, error, []

    def warmup(self, *arguments, grid, **constants):
        if self.gate is not None:
            assert self.gate.wait(20)
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(run=None)

    def job(self, **constants):
        return Job(self, (1,), (), constants)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(compilation, "_ready", set())
    monkeypatch.setattr(compilation, "_underway", {})


def compile_(jobs, dtype=torch.float32, **others):
    compiled(jobs, dtype, CPU, **others)


def test_a_call_compiles_once_for_each_dtype_and_set_of_constants():
    kernel = Kernel()
    compile_({"a": kernel.job(TILE=16)})
    met = len(kernel.threads)
    assert met > 0
    compile_({"a": kernel.job(TILE=16)})
    assert len(kernel.threads) == met
    compile_({"a": kernel.job(TILE=32)})
    compile_({"a": kernel.job(TILE=16)}, torch.bfloat16)
    assert len(kernel.threads) == 3 * met


def test_what_follows_is_compiled_by_the_call_and_what_comes_later_behind_it():
    gate = threading.Event()
    own, following, later = Kernel(), Kernel(), Kernel(gate)
    compile_({"a": own.job()}, following=lambda: {"b": following.job()}, later=lambda: {"c": later.job()})
    assert own.threads
    assert following.threads
    assert not later.threads  # nobody waited
    waiting = threading.Thread(target=compile_, args=({"c": later.job()},))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    gate.set()
    waiting.join(20)
    assert not waiting.is_alive()
    assert set(later.threads) == {name for name in later.threads if name.startswith("theria-compile")}


def test_a_failure_in_the_background_is_raised_by_the_call_that_needs_the_kernel():
    broken = Kernel(error=RuntimeError("no compiler"))
    compile_({"a": Kernel().job()}, later=lambda: {"c": broken.job()})
    with pytest.raises(RuntimeError, match="no compiler"):
        compile_({"c": broken.job()})


def test_nothing_is_compiled_for_later_where_there_is_nothing_to_do():
    compile_({"a": Kernel().job()}, later=dict)
    assert not compilation._underway
