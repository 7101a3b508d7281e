"""Tokens a second by the host's clock, and what a device could do at most."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

_TERA = 1e12
_HALF_PRECISION_TFLOPS = {
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 4090": 165.0,
}
"""Dense bfloat16 products by the device's whole name, from the makers' data sheets.

A part of the name would take another card, a laptop's chip or a slice of a device (MIG) for it."""


def peak_flops_of(device: torch.device, precision: str, configured: float | None) -> float | None:
    """Operations a second that the device could do: as configured in tera, or looked up, or None.

    Args:
        device: where training runs.
        precision: Lightning's name of it; only half precision is looked up.
        configured: in tera; it comes first.
    """
    if configured is not None:
        return configured * _TERA
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    peak = _HALF_PRECISION_TFLOPS.get(torch.cuda.get_device_name(device))
    return None if peak is None else peak * _TERA


class Rate(NamedTuple):
    """Means over a lap.

    Attributes:
        tokens_per_second: of this process.
        step_seconds: seconds an optimiser step.
        length: tokens of a sequence.
    """

    tokens_per_second: float
    step_seconds: float
    length: int


class Throughput:
    """The clock of a training loop.

    Steps are timed on the host and tell when they were handed out. A lap is exact where the device is waited
    for at its end, as when metrics are read: then everything in it was done in it.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a lap and a step now."""
        self._lap_started = self._step_started = time.perf_counter()
        self._tokens = self._steps = self._length = 0
        self._paused_at: float | None = None

    def count(self, tokens: Tensor) -> None:
        """Count the tokens (batch, length) of a forward pass."""
        self._tokens += tokens.numel()
        self._length = tokens.shape[1]

    def step(self) -> float:
        """End a step: its seconds."""
        now = time.perf_counter()
        seconds, self._step_started = now - self._step_started, now
        self._steps += 1
        return seconds

    def lap(self) -> Rate:
        """End a lap of at least one step: its means."""
        now = time.perf_counter()
        seconds = now - self._lap_started
        rate = Rate(self._tokens / seconds, seconds / self._steps, self._length)
        self._lap_started, self._tokens, self._steps = now, 0, 0
        return rate

    def pause(self) -> None:
        """Stop the clock, for a validation."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Let the clock go on."""
        if self._paused_at is not None:
            away, self._paused_at = time.perf_counter() - self._paused_at, None
            self._lap_started += away
            self._step_started += away
