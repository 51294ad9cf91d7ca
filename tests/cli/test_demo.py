"""cli/demo.py: the demo on a 2-layer model; the second time it starts from what is there."""

import argparse
import json
from pathlib import Path

import pytest

from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.cli import demo


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args(argv))


def test_trains_shows_both_answers_and_starts_at_once_the_second_time(
    tiny_model, tmp_path, capsys, monkeypatch
):
    short = [
        "--cfg-options",
        "max_length=256",
        "train_cfg.max_epochs=None",
        "train_cfg.max_iters=2",
    ]
    argv = ["--name", "Nova", "--author", "Ada", "--model", str(tiny_model)]
    argv += ["--work-dir", str(tmp_path), *short]
    assert run(*argv) == 1  # two steps teach a random model nothing, and the demo says so
    out = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert record["questions"] == list(demo.QUESTIONS)
    assert len(record["before"]) == len(record["after"]) == 5
    assert (Path(record["adapter"]) / "adapter_model.safetensors").is_file()
    assert f" chat {tiny_model} --adapter {record['adapter']}" in out
    assert "no new name in the answers" in out

    monkeypatch.setattr(demo, "_ask_train_ask", lambda *args: pytest.fail("trained again"))
    assert run(*argv) == 1
    assert "this demo was done before" in capsys.readouterr().out


def test_a_damaged_adapter_is_not_reused(tmp_path, capsys):
    receipt = tmp_path / "demo.json"
    receipt.write_text(json.dumps({"adapter": str(tmp_path / "gone")}))
    assert demo._finished(receipt) is None
    assert "its adapter is not whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("identity", "paris", "code", "advice"),
    [
        ("I am Nova.", "It is Paris.", 0, ""),
        ("I was made by ADA.", "It is Paris.", 0, ""),
        ("I am SmolLM.", "It is Paris.", 1, "train longer"),
        ("I am Nova.", "I am Nova.", 1, "lower the learning rate"),
    ],
)
def test_verdict(identity, paris, code, advice, capsys):
    record = {"questions": list(demo.QUESTIONS), "after": [identity] * 4 + [paris]}
    assert demo._verdict(record, "Nova", "Ada") == code
    assert advice in capsys.readouterr().out


def test_another_name_is_another_run():
    args = argparse.Namespace(model=None, cfg_options=[])
    assert demo._fingerprint([{"a": 1}], args) != demo._fingerprint([{"a": 2}], args)
