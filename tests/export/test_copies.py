"""Split, checkpoints, .pth files, 4 and 8 bits: the same model in other files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.export.conftest import save_base
from xtuner_lite.engine.checkpoint import write_checkpoint
from xtuner_lite.export.copies import convert_pth, copy_checkpoint, split_model
from xtuner_lite.export.publish import ExportError


def test_split(untied, tmp_path):
    receipt = split_model(untied, tmp_path / "out", max_shard_size="20KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(f.stat().st_size < 23_000 or len(load_file(f)) == 1 for f in files)
    found = {k: v for f in files for k, v in load_file(f).items()}
    for name, tensor in load_file(untied / "model.safetensors").items():
        assert torch.equal(found[name], tensor)
    assert receipt.verification["max_logit_difference"] == 0  # the same numbers
    AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    again = split_model(tmp_path / "out", tmp_path / "one", verify="none")
    assert (tmp_path / "one/model.safetensors").is_file()
    assert "not compared" in again.notes[0]


def test_pickled_weights_are_loaded_whole(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(str(base))
    pickled = save_base(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    receipt = split_model(pickled, tmp_path / "out")
    assert receipt.notes == ["its files have another layout, so it was loaded whole"]
    assert receipt.verification["tokens_equal"]


def test_a_checkpoint_is_copied_without_its_trainer(base, tmp_path):
    def write(folder):
        save_base(folder)
        (folder / "trainer").mkdir()
        (folder / "trainer/state.json").write_text("{}")
        (folder / "config.py").write_text("x = 1")

    step = tmp_path / "run/checkpoints/iter_3"
    write_checkpoint(step, write)
    receipt = copy_checkpoint(tmp_path / "run", tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "export_receipt.json"}
    assert not names & {"trainer", "manifest.json", "config.py"}
    assert "none was changed" in receipt.notes[0]
    (step / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="has 7 bytes"):
        copy_checkpoint(step, tmp_path / "again")
    with pytest.raises(ExportError, match="holds neither a model nor an adapter"):
        copy_checkpoint(tmp_path, tmp_path / "again")


PTH_CONFIG = """
from peft import LoraConfig
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm, load_tokenizer

model_path = {path!r}
tokenizer = dict(type=load_tokenizer, path=model_path)
lora = dict(type=LoraConfig, r=4, target_modules="all-linear")
model = dict(type=SupervisedFinetune, llm=dict(type=load_causal_lm, path=model_path), lora=lora)
"""


def test_a_pth_file_of_xtuner(base, tmp_path):
    """XTuner stores the adapter alone, under llm., with trainer objects beside it."""
    from xtuner_lite.config import load_config
    from xtuner_lite.registry import MODELS

    config = tmp_path / "cfg.py"
    config.write_text(PTH_CONFIG.format(path=str(base)))
    method = MODELS.build(load_config(str(config)).model)
    trained = {n: torch.randn_like(p) for n, p in method.trainable_parameters().items()}
    torch.save({"state_dict": trained, "message_hub": Exception("an object")}, tmp_path / "x.pth")
    receipt = convert_pth(config, tmp_path / "x.pth", tmp_path / "out")
    assert receipt.verification["tensors"] == len(trained) == 28  # 2 layers x 7 x (A, B)
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B"
    assert torch.equal(saved[f"{name}.weight"], trained[f"llm.{name}.default.weight"])
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 4
    torch.save({"state_dict": {"llm.other": torch.zeros(1)}}, tmp_path / "y.pth")
    with pytest.raises(ExportError, match="missing: .* do not fit|do not fit .*missing"):
        convert_pth(config, tmp_path / "y.pth", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_on_fewer_bits(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from xtuner_lite.export.quantised import quantise_model

    base = save_base(tmp_path / "base", dtype=torch.bfloat16, hidden_size=64)
    receipt = quantise_model(base, tmp_path / "out", bits=bits)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"][f"load_in_{bits}bit"] is True
    assert receipt.verification["quantisation"]["max_logit_difference"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert loaded.is_quantized
    with pytest.raises(ExportError, match="is quantised .bitsandbytes., and splitting needs"):
        split_model(tmp_path / "out", tmp_path / "again")
