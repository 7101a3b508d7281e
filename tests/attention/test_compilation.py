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
    # again by the call itself, which finds it compiled and loads it
    assert later.threads[0].startswith("theria-compile")
    assert not later.threads[-1].startswith("theria-compile")


def test_a_failure_in_the_background_is_tried_again_by_the_call_that_needs_the_kernel():
    broken, passing = (Kernel(error=RuntimeError("no compiler")) for _ in range(2))
    for kernel, name in ((broken, "c"), (passing, "d")):
        compile_({"a" + name: Kernel().job()}, later=lambda k=kernel, n=name: {n: k.job()})
    compilation._underway[next(reversed(compilation._underway))].exception()
    with pytest.raises(RuntimeError, match="no compiler"):
        compile_({"c": broken.job()})
    passing.error = None
    compile_({"d": passing.job()})


def test_threads_that_ask_at_once_compile_once():
    kernel = Kernel()
    compile_({"b": kernel.job()})
    alone = len(kernel.threads)
    kernel.threads.clear()
    threads = [threading.Thread(target=compile_, args=({"a": kernel.job()},)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernel.threads) == alone


def test_nothing_is_started_once_the_main_thread_has_ended(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(threading, "main_thread", lambda: SimpleNamespace(is_alive=lambda: False))
    compile_({"a": kernel.job()})
    assert not kernel.threads


def test_a_forked_process_has_nothing_underway():
    compile_({"a": Kernel().job()}, later=lambda: {"c": Kernel().job()})
    before = compilation._background
    compilation._start_over()
    assert not compilation._underway
    assert compilation._background is not before


def test_nothing_is_compiled_for_later_where_there_is_nothing_to_do():
    compile_({"a": Kernel().job()}, later=dict)
    assert not compilation._underway
