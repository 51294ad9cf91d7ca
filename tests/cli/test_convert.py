"""`convert` on the command line: what it says, where it refuses."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig

from tests.export.conftest import save_random_adapter
from xtuner_lite.cli.main import main


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    config = LoraConfig(r=4, target_modules="all-linear")
    return str(save_random_adapter(model_folder, config, tmp_path_factory.mktemp("adapter")))


def test_merge(model_folder, adapter, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["convert", "merge", "auto", adapter, out]) == 0
    said = capsys.readouterr().out
    assert f"{out} is written" in said
    assert "checked (loaded): 4 prompts, greedy tokens the same" in said
    assert "stops at [2]" in said
    assert main(["convert", "merge", str(model_folder), adapter, out]) == 2
    assert "is not empty; name another folder" in capsys.readouterr().err
    words = ["convert", "merge", str(model_folder), adapter, out, "--overwrite", "--verify", "none"]
    assert main(words) == 0
    assert "note: logits and tokens were not compared" in capsys.readouterr().out


def test_merge_names_no_base_twice(model_folder, adapter, tmp_path, capsys):
    assert main(["convert", "merge", adapter, adapter, str(tmp_path / "out")]) == 2
    assert "holds an adapter, not a model" in capsys.readouterr().err
    assert main(["convert", "merge", str(tmp_path / "no"), adapter, str(tmp_path / "out")]) == 2
    assert "error: no model folder" in capsys.readouterr().err


def test_split(model_folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["convert", "split", str(model_folder), out, "--max-shard-size", "30KB"]) == 0
    assert (tmp_path / "out/model.safetensors.index.json").is_file()


def test_pth_to_hf_says_there_is_nothing_to_convert(adapter, tmp_path, capsys):
    assert main(["convert", "pth_to_hf", adapter, str(tmp_path / "out")]) == 0
    assert "nothing to convert, files copied" in capsys.readouterr().out
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert main(["convert", "pth_to_hf", "x.pth", str(tmp_path / "again")]) == 2
    assert "name the config" in capsys.readouterr().err
    assert main(["convert", "pth_to_hf", "x"]) == 2
    assert "give CHECKPOINT OUT" in capsys.readouterr().err


def test_gguf(model_folder, tmp_path, capsys):
    pytest.importorskip("gguf")
    words = ["convert", "gguf", str(model_folder), str(tmp_path / "tiny.gguf"), "--no-modelfile"]
    assert main(words) == 0
    assert "f16 moves logits by up to" in capsys.readouterr().out
    receipt = json.loads((tmp_path / "tiny/export_receipt.json").read_text())
    assert set(receipt["outputs"]) == {"tiny.gguf"}
