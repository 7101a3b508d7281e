"""The report says what the registry decides."""

import sys

import pytest

from theria.attention import registered_backend
from theria.attention.__main__ import describe, main
from theria.attention.reference import reference_attention


def test_the_report_names_backends_refusals_and_choices(only_reference):
    def supports(call):
        return None if call.query_shape[-1] <= 64 else f"it supports E up to 64, not {call.query_shape[-1]}"

    with registered_backend("triton_fused", reference_attention, supports=supports):
        report = describe()
    assert "reference\n  takes: cpu float32 E=64" in report
    assert "it supports E up to 64, not 256: cpu float32 E=256" in report
    assert "cpu float32   E=64: triton_fused, E=256: reference, E=320: reference" in report


def test_the_command_prints_it_and_wants_to_be_asked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["theria.attention", "--describe"])
    main()
    assert "auto picks" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["theria.attention"])
    with pytest.raises(SystemExit):
        main()
