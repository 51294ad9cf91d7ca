"""cli/make_identity.py: the command that writes the self-introduction data."""

import argparse
import json
import subprocess
import sys

import pytest

from xtuner_lite.cli import make_identity


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    make_identity.add_arguments(parser)
    return make_identity.run(parser.parse_args(argv))


def test_writes_json_and_says_so(tmp_path, capsys):
    out = tmp_path / "new" / "me.json"
    assert run("--name", "Nova", "--author", "Ada", "-n", "5", "--lang", "en", str(out)) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert len(rows) == 5
    assert rows[0]["messages"][0]["role"] == "user"
    assert "wrote 5 rows to" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["me.json"]  # nothing left aside


def test_writes_json_lines_in_readable_chinese(tmp_path):
    out = tmp_path / "me.jsonl"
    assert run("--name", "小星", "--author", "Ada", "--lang", "zh", str(out)) == 0
    lines = out.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 71
    assert any("小星" in line for line in lines)
    assert all(set(json.loads(line)) == {"messages"} for line in lines)


def test_never_overwrites_without_force(tmp_path):
    out = tmp_path / "me.json"
    out.write_text("mine")
    message = "me.json exists and is not overwritten.*--force"
    with pytest.raises(make_identity.OutputError, match=message):
        run(str(out), "--name", "N", "--author", "A")
    assert out.read_text() == "mine"
    assert run(str(out), "--name", "N", "--author", "A", "--force") == 0
    assert json.loads(out.read_text(encoding="utf-8"))


def test_refuses_another_ending(tmp_path):
    with pytest.raises(ValueError, match=r"me.txt: the ending must be .json or .jsonl"):
        run(str(tmp_path / "me.txt"), "--name", "N", "--author", "A")


def test_both_languages_by_a_comma_and_an_unknown_one_is_named(tmp_path):
    assert run("--name", "N", "--author", "A", "--lang", "en,zh", str(tmp_path / "a.json")) == 0
    assert len(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == 151
    with pytest.raises(ValueError, match=r"languages=\['de'\]: allowed are 'en' and 'zh'"):
        run("--name", "N", "--author", "A", "--lang", "de", str(tmp_path / "b.json"))


def test_imports_no_torch():
    code = "import sys, xtuner_lite.cli.make_identity; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
