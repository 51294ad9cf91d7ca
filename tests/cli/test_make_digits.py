"""``xtuner-lite make-digits``: what it writes is found again, and is not overwritten unasked."""

import json

import numpy as np
import pytest
from PIL import Image

from xtuner_lite.cli.main import main


@pytest.fixture
def few_digits(monkeypatch):
    """Ten images instead of scikit-learn's 1,797."""
    greys = np.arange(10 * 64).reshape(10, 8, 8) % 17.0
    monkeypatch.setattr(
        "xtuner_lite.data.digits.load_scikit_digits", lambda: (greys, np.arange(10))
    )


def test_every_named_image_is_there(few_digits, tmp_path, capsys):
    out = tmp_path / "digits"
    assert main(["make-digits", str(out), "--size", "28", "--num-test", "4"]) == 0
    counts = {}
    for name in ("captions", "questions", "test"):
        rows = json.loads((out / f"{name}.json").read_text())
        counts[name] = len(rows)
        for row in rows:
            with Image.open(out / row["image"]) as image:
                assert image.size == (28, 28)
    assert counts == {"captions": 6, "questions": 6, "test": 12}
    assert len(list((out / "images").rglob("*.png"))) == 10
    assert "wrote 12 questions about 4 other images" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(few_digits, tmp_path, capsys):
    out = str(tmp_path / "digits")
    assert main(["make-digits", out, "--num-test", "4"]) == 0
    assert main(["make-digits", out, "--num-test", "5"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["make-digits", out, "--num-test", "5", "--force"]) == 0
    assert len(list((tmp_path / "digits/images/test").iterdir())) == 5
    assert len(list((tmp_path / "digits/images/train").iterdir())) == 5


def test_pictures_of_others_are_never_touched(few_digits, tmp_path, capsys):
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(folder / "my_cat.png")
    Image.new("RGB", (3, 3)).save(folder / "0005.png")
    assert main(["make-digits", str(tmp_path), "--num-test", "4"]) == 2
    assert "0005.png exists and is not overwritten" in capsys.readouterr().err
    assert main(["make-digits", str(tmp_path), "--num-test", "4", "--force"]) == 0
    assert (folder / "my_cat.png").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--size", "4"], "8 to 1024 pixels"), (["--num-test", "10"], "from 1 to 9")],
)
def test_bad_numbers(few_digits, tmp_path, capsys, option, message):
    assert main(["make-digits", str(tmp_path), *option]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_real_digits(tmp_path):
    pytest.importorskip("sklearn")
    assert main(["make-digits", str(tmp_path), "--size", "14"]) == 0
    rows = json.loads((tmp_path / "test.json").read_text())
    assert len(rows) == 900
    answers = [row["conversations"][1]["value"] for row in rows if row["kind"] == "which_digit"]
    assert set(answers) == set("0123456789")
    assert len(list((tmp_path / "images/train").iterdir())) == 1497
