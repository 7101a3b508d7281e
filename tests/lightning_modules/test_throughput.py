"""Tokens a second under a clock that the test sets."""

import pytest
import torch

from lightning_modules import throughput
from lightning_modules.throughput import Throughput, peak_flops_of


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_a_lap_is_what_was_done_in_it(clock):
    watch = Throughput()
    seconds = []
    for duration in (1.0, 3.0):
        clock[0] += duration
        watch.count(torch.zeros(2, 5))
        seconds.append(watch.step())
    assert seconds == [1.0, 3.0]
    assert watch.lap() == (20 / 4, 2.0, 5)
    clock[0] += 2.0
    watch.count(torch.zeros(1, 8))
    watch.step()
    assert watch.lap() == (4.0, 2.0, 8)


def test_a_pause_does_not_count(clock):
    watch = Throughput()
    clock[0] += 1.0
    watch.pause()
    clock[0] += 50.0
    watch.resume()
    clock[0] += 1.0
    watch.count(torch.zeros(4, 1))
    assert watch.step() == 2.0
    assert watch.lap() == (2.0, 2.0, 1)


def test_a_resume_without_a_pause_does_nothing(clock):
    watch = Throughput()
    watch.resume()
    clock[0] += 1.0
    assert watch.step() == 1.0


def test_the_peak_is_configured_or_known_for_half_precision(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops_of(cuda, "bf16-mixed", None) == 989e12
    assert peak_flops_of(cuda, "32-true", None) is None
    assert peak_flops_of(cpu, "bf16-mixed", None) is None
    assert peak_flops_of(cpu, "32-true", 2.5) == 2.5e12
    for name, peak in {
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200 MIG 1g.18gb": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "something new": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops_of(cuda, "bf16-mixed", None) == peak
