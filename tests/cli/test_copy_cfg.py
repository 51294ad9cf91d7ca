"""xtuner-lite copy-cfg."""

from __future__ import annotations

from xtuner_lite.cli.main import main

NAME = "smollm2_135m_sft_lora_identity"


def test_copy_says_what_to_do_next(tmp_path, capsys):
    assert main(["copy-cfg", NAME, str(tmp_path)]) == 0
    file = tmp_path / f"{NAME}_copy.py"
    assert file.is_file()
    assert f"xtuner-lite train {file}" in capsys.readouterr().out


def test_second_copy_needs_force(tmp_path, capsys):
    assert main(["copy-cfg", NAME, str(tmp_path)]) == 0
    assert main(["copy-cfg", NAME, str(tmp_path)]) == 2
    assert "exists and was left as it is" in capsys.readouterr().err
    assert main(["copy-cfg", NAME, str(tmp_path), "--force", "--flatten"]) == 0
    assert "read_base" not in (tmp_path / f"{NAME}_copy.py").read_text()
