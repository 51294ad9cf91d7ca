"""xtuner-lite preview-data."""

import pytest

from xtuner_lite.cli.main import main
from xtuner_lite.cli.preview_data import OutputError


def test_in_the_terminal(project, capsys):
    assert main(["preview-data", "cfg.py", "-n", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count("number 1 in the order of training") == 1
    assert "number 2" not in text
    assert "[[It is" in text
    assert main(["preview-data", "cfg.py", "-n", "1", "--color", "always"]) == 0
    assert "\033[1;32mIt is" in capsys.readouterr().out


def test_one_row(project, capsys):
    assert main(["preview-data", "cfg.py", "--row", ":3"]) == 0
    text = capsys.readouterr().out
    assert "data.json:3, " in text
    assert "What is 1 plus two?" in text
    assert text.count("--- segment ") == 1  # the others in its pack are left out
    assert main(["preview-data", "cfg.py", "--row", "data.json:99"]) == 1
    error = capsys.readouterr().err
    assert "no sample holds the row 'data.json:99'; rows are called like data.json:" in error


def test_a_page(project, capsys):
    out = project / "new" / "page.html"
    assert main(["preview-data", "cfg.py", "--html", str(out), "-n", "3"]) == 0
    assert "wrote 3 of " in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert "<h1>cfg.py: train data</h1>" in page
    assert page.count("<section class=sample>") == 3
    assert "rows kept" in page


def test_a_page_is_not_overwritten(project, capsys):
    out = project / "page.html"
    out.write_text("mine")
    assert main(["preview-data", "cfg.py", "--html", str(out)]) == OutputError.exit_code == 2
    assert "page.html exists and is not overwritten; give --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["log-dataset", "cfg.py", "--html", str(out), "--force"]) == 0
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_data_that_are_not_there(project, capsys):
    assert main(["preview-data", "cfg.py", "--data", "val"]) == 1
    assert "the config has no val_dataloader; add one" in capsys.readouterr().err


def test_samples_without_tokens(project, capsys):
    with (project / "cfg.py").open("a") as file:
        file.write("from tests.toy import ToyData, toy_collate\n")
        file.write("train_dataloader = dict(batch_size=2, dataset=dict(type=ToyData),\n")
        file.write("                        collate_fn=dict(type=toy_collate))\n")
        file.write("del train_set, data_path, max_length\n")
    assert main(["preview-data", "cfg.py"]) == 1
    assert "nothing to preview: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--max-tokens", "5"]])
def test_cut_short(project, words, capsys):
    assert main(["preview-data", "cfg.py", *words]) == 0
    assert "more tokens" in capsys.readouterr().out
