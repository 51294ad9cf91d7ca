"""``xtuner-lite demo-vlm``, on a tiny model and tower; the picture; the verdict."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.tiny_parts import write_tiny_llm, write_tiny_tower
from xtuner_lite.cli import demo_vlm
from xtuner_lite.cli.main import main
from xtuner_lite.cli.make_digits import write_digits

KIND_ANSWERS = {"which_digit": "3", "larger_than_five": "No", "even_or_odd": "Odd"}


@pytest.fixture
def few_digits(monkeypatch):
    greys = np.arange(12 * 64).reshape(12, 8, 8) % 17.0
    targets = np.arange(12) % 10
    monkeypatch.setattr("xtuner_lite.data.digits.load_scikit_digits", lambda: (greys, targets))


def reply(name, kind, text, image="images/test/0000.png"):
    return {
        "name": f"{name}:{kind}", "kind": kind, "question": f"\nWhat of {kind}?",
        "images": [image], "reply": text, "answers": [KIND_ANSWERS[kind]],
        "scores": {"exact_match": float(text == KIND_ANSWERS[kind])},
    }  # fmt: skip


def test_two_stages_and_three_rounds(few_digits, monkeypatch, tmp_path, capsys):
    llm, tower = write_tiny_llm(tmp_path / "llm"), write_tiny_tower(tmp_path / "tower")
    monkeypatch.setattr(
        demo_vlm, "write_digits", lambda folder, **o: write_digits(folder, num_test=4, **o)
    )
    words = [f"model_path={llm}", f"visual_encoder_path={tower}", "train_cfg.max_epochs=None"]
    words += ["train_cfg.max_iters=2", "val_dataloader.batch_size=4", "val_cfg.max_new_tokens=3"]
    words += ["val_cfg.type=ReplyValLoop"]
    command = ["demo-vlm", "--work-dir", str(tmp_path / "demo")]
    command += ["--stage-one-options", *words, "--stage-two-options", *words]
    assert main(command) == 1  # two steps of a random model do not see
    (folder,) = (tmp_path / "demo").iterdir()
    record = json.loads((folder / demo_vlm.RECORD).read_text())
    assert list(record["figures"]) == list(demo_vlm.ROUNDS)
    assert record["asked"]["after stage two"] == dict.fromkeys(demo_vlm.KINDS, 4)
    for figures in record["figures"].values():
        assert {f"exact_match/{kind}" for kind in demo_vlm.KINDS} <= set(figures)
    with Image.open(folder / demo_vlm.PICTURE) as picture:
        assert min(picture.size) > 300
    # stage two began with what stage one learnt
    from xtuner_lite.runner.run_files import CONFIG_FILE

    (config,) = (folder / "stage_two").glob(f"*/{CONFIG_FILE}")
    assert str(folder / "stage_one/checkpoints/iter_2") in config.read_text()
    printed = capsys.readouterr().out
    assert "goal" in printed
    assert main(command) == 1
    assert "this demo was done before" in capsys.readouterr().out


def record(share):
    figures = {
        name: {f"exact_match/{kind}": share for kind in demo_vlm.KINDS}
        | {"contains_answer/which_digit": share}
        for name in demo_vlm.ROUNDS
    }
    return {
        "figures": figures,
        "asked": {name: dict.fromkeys(demo_vlm.KINDS, 300) for name in demo_vlm.ROUNDS},
        "training_s": [1.0, 2.0], "total_s": 5.0, "picture": "answers.png",
        "checkpoints": ["one", "two"],
    }  # fmt: skip


def test_the_goal_decides_the_exit_code(capsys):
    assert demo_vlm._show(record(0.9)) == 0
    assert "goal" not in capsys.readouterr().out
    assert demo_vlm._show(record(0.8)) == 1
    assert "80.0% of the digits are named right, and 85% is the goal" in capsys.readouterr().out


def test_a_picture_asks_another_image_in_each_cell():
    names = [f"images/test/{n}.png:{kind}" for n in range(6) for kind in demo_vlm.KINDS]
    shown = demo_vlm._to_show(names, 4)
    assert len({name.split(":")[0] for name in shown}) == 4
    assert [name.split(":")[1] for name in shown] == [*demo_vlm.KINDS, "which_digit"]


def test_replies_with_signs_of_mathematics_are_drawn_as_they_are(tmp_path):
    (tmp_path / "images/test").mkdir(parents=True)
    Image.new("L", (28, 28)).save(tmp_path / "images/test/0000.png")
    rounds = {
        name: [reply("a", "which_digit", text)]
        for name, text in zip(demo_vlm.ROUNDS, ["$x_", "", "3"], strict=True)
    }
    file = demo_vlm.draw_answers(tmp_path, rounds, tmp_path)
    with Image.open(file) as picture:
        assert picture.width > 100


def test_other_options_are_another_run():
    import argparse

    def named(**options):
        given = {"stage_one_options": [], "stage_two_options": [], **options}
        return demo_vlm._fingerprint(argparse.Namespace(**given))

    assert named() == named()
    assert named() != named(stage_two_options=["lr=1"])
