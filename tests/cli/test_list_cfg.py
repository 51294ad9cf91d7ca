"""xtuner-lite list-cfg."""

from __future__ import annotations

from xtuner_lite.cli.main import main


def test_all(capsys):
    assert main(["list-cfg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4
    (line,) = [line for line in lines if line.startswith("smollm2_135m_sft_lora_identity ")]
    assert "learns its name" in line


def test_pattern(capsys):
    assert main(["list-cfg", "-p", "135m_sft_lora_identity"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_nothing_fits(capsys):
    assert main(["list-cfg", "-p", "zzz"]) == 1
    assert "no config fits 'zzz'" in capsys.readouterr().err
