"""Which ptxas assembles the kernels for Hopper."""

import logging

import pytest
import torch
import triton
from triton.knobs import NvidiaTool

from theria.attention.kernels import assembler, support
from theria.attention.kernels.assembler import newest

HOPPER = torch.device("cuda:0")


def tool(version: str) -> NvidiaTool:
    return NvidiaTool(f"/ptxas-{version}", version)


@pytest.fixture
def executable(tmp_path):
    """Makes an assembler that says its version, as Triton asks for it."""

    def make(version: str) -> NvidiaTool:
        path = tmp_path / f"ptxas-{version}"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        path.chmod(0o755)
        made = NvidiaTool.from_path(str(path))
        assert made is not None
        return made

    return make


@pytest.fixture
def hopper(monkeypatch, executable):
    """A Hopper GPU of a driver for CUDA 13, and the assemblers that there are."""
    cached = (assembler.assembler, assembler._install_once, assembler._is_hopper)
    knob = vars(triton.knobs.nvidia)

    def forget() -> None:
        knob.pop("ptxas", None)
        for function in cached:
            function.cache_clear()

    def with_tools(*bundled: str, packaged: tuple[str, ...] = (), chosen: str = "") -> None:
        monkeypatch.setattr(assembler, "_bundled", lambda: [executable(version) for version in bundled])
        monkeypatch.setattr(assembler, "_packaged", lambda: [executable(version) for version in packaged])
        monkeypatch.setenv("TRITON_PTXAS_PATH", chosen and executable(chosen).path)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(assembler, "driver_major", lambda: 13)
    forget()
    yield with_tools
    forget()


def test_versions_are_compared_as_numbers():
    assert newest([tool("12.8"), tool("12.10"), tool("12.9")], 12).version == "12.10"


def test_code_of_a_later_major_release_than_the_drivers_is_not_made():
    assert newest([tool("12.8"), tool("13.1"), tool("12.9")], 12).version == "12.9"
    assert newest([tool("12.8"), tool("13.1")], 0).version == "12.8"


def test_the_newest_is_installed_once(hopper, caplog):
    hopper("12.8", "13.1", packaged=("12.9", "13.3"))
    with caplog.at_level(logging.INFO, "theria"):
        assembler.install(HOPPER)
        assembler.install(HOPPER)
    found = triton.knobs.nvidia.ptxas
    assert found.version == "13.3"
    assert [record.message for record in caplog.records] == [
        f"the attention kernels are assembled by ptxas 13.3 ({found.path})"
    ]


def test_a_newer_one_is_advised(hopper, caplog):
    hopper("12.8", "13.1")
    with caplog.at_level(logging.INFO, "theria"):
        assembler.install(HOPPER)
    assert "ptxas 13.3 or later is advised for Hopper: pip install theria[hopper]" in caplog.text


def test_other_devices_keep_tritons_choice(hopper, monkeypatch):
    hopper("12.8", "13.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assembler.install(HOPPER)
    assert "ptxas" not in vars(triton.knobs.nvidia)
    assert assembler.reason_against(HOPPER) is None


def test_the_users_choice_stands(hopper):
    hopper("12.8", "13.1", packaged=("13.3",), chosen="12.9")
    assembler.install(HOPPER)
    assert triton.knobs.nvidia.ptxas.version == "12.9"
    assert assembler.reason_against(HOPPER) is None


@pytest.mark.parametrize("chosen", ["", "12.8"])
def test_an_assembler_that_makes_wrong_code_is_refused(hopper, chosen):
    hopper("12.8", "12.8", chosen=chosen)
    reason = support.refusal(torch.bfloat16, HOPPER, 64)
    assert reason is not None
    assert reason.startswith("it supports Hopper GPUs with ptxas 12.9 or later")
    assert "pip install theria[hopper]" in reason
