"""Which device figures come from."""

import platform

import torch


def device_name(device: torch.device | str) -> str:
    """The name of a GPU, or of the processor for any other device."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
