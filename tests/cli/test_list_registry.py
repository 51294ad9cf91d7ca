"""xtuner-lite list."""

from __future__ import annotations

from xtuner_lite.cli.main import main


def test_registries(capsys):
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 15


def test_names_with_description_and_place(capsys):
    assert main(["list", "hooks", "EMA*"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("EMAHook  A Hook to apply Exponential Moving Average")
    assert "ema_hook.py:" in line


def test_dashes_and_capitals(capsys):
    assert main(["list", "MAP-FNS"]) == 0
    assert "alpaca" in capsys.readouterr().out


def test_unknown_registry(capsys):
    assert main(["list", "hoks"]) == 2
    assert "did you mean 'hooks'" in capsys.readouterr().err


def test_nothing_fits(capsys):
    assert main(["list", "hooks", "zzz"]) == 1
    assert "no hook fits 'zzz'" in capsys.readouterr().err


def test_map_functions_show_an_example_row(capsys):
    assert main(["list", "map_fns", "pretrain"]) == 0
    line, example = capsys.readouterr().out.splitlines()
    assert line.startswith("pretrain  Plain text")
    assert example.strip() == '{"text": "A document of any length."}'
