"""Merging: equal to peft's own merge, layer by layer, and refused where it would be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.conftest import save_base
from xtuner_lite.export import merge_layers
from xtuner_lite.export.merge import merge_adapter
from xtuner_lite.export.publish import ExportError

ALL = {"r": 4, "target_modules": "all-linear"}
SOME = {"target_modules": ["q_proj", "down_proj"]}
TIED = {
    "lora": LoraConfig(**ALL),
    "rslora": LoraConfig(use_rslora=True, rank_pattern={"q_proj": 2}, **ALL),
    "alpha_of_a_layer": LoraConfig(alpha_pattern={"layers.0.self_attn.k_proj": 3}, **ALL),
    "one_layer": LoraConfig(r=4, layers_to_transform=[1], **SOME),
    "dora": LoraConfig(use_dora=True, **ALL),
    "pissa": LoraConfig(init_lora_weights="pissa", **ALL),
    "olora": LoraConfig(init_lora_weights="olora", **ALL),
    "embedding": LoraConfig(modules_to_save=["embed_tokens"], **ALL),
    "embedding_and_head": LoraConfig(
        modules_to_save=["embed_tokens"], ensure_weight_tying=True, **ALL
    ),
    "lora_on_the_embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "rows": LoraConfig(trainable_token_indices=[5, 7], **ALL),
    "loha": LoHaConfig(**SOME),
    "lokr": LoKrConfig(**SOME),
    "ia3": IA3Config(feedforward_modules=["down_proj"], **SOME),
}
UNTIED = {
    "lora": LoraConfig(**ALL),
    "dora": LoraConfig(use_dora=True, **ALL),
    "head": LoraConfig(modules_to_save=["lm_head"], **ALL),
    "both": LoraConfig(modules_to_save=["lm_head", "embed_tokens"], **ALL),
    "rows": LoraConfig(trainable_token_indices={"embed_tokens": [5], "lm_head": [5]}, **ALL),
}


def peft_merge(base, adapter):
    """The state dict peft's own merge gives in float32."""
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


@pytest.mark.parametrize("name", TIED)
def test_equal_to_pefts_merge(name, base, adapter_of, tmp_path):
    adapter = adapter_of(base, TIED[name])
    receipt = merge_adapter(base, adapter, tmp_path / "out", verify="streamed")
    assert receipt.notes == []  # layer by layer, not in memory
    assert receipt.verification["tokens_equal"]
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).state_dict()
    expected = peft_merge(base, adapter).state_dict()
    changed = 0
    plain = AutoModelForCausalLM.from_pretrained(str(base)).state_dict()
    for key, tensor in expected.items():
        if key == "lm_head.weight" and name == "lora_on_the_embedding":
            tensor = plain[key]  # peft's merge changes the tied head too, its forward does not
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(merged[key], plain[key])
    assert changed


@pytest.mark.parametrize("name", UNTIED)
def test_bf16_is_rounded_once(name, untied, adapter_of, tmp_path):
    adapter = adapter_of(untied, UNTIED[name])
    merge_adapter(untied, adapter, tmp_path / "out", verify="streamed")
    merged = load_file(tmp_path / "out/model.safetensors")
    expected = peft_merge(untied, adapter).state_dict()
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert merged[key].dtype == torch.bfloat16
        # Two orders of summing may fall on two sides of a rounding border: one bf16 step, 2**-7.
        torch.testing.assert_close(merged[key].float(), tensor, rtol=2**-7, atol=1e-6)


def test_loaded_by_transformers_too(base, adapter_of, tmp_path):
    adapter = adapter_of(base, LoraConfig(**ALL))
    receipt = merge_adapter(base, adapter, tmp_path / "out", verify="loaded", max_shard_size="20KB")
    assert receipt.verification["how"] == "loaded"
    assert receipt.verification["max_logit_difference"] < 1e-4
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    written = json.loads((tmp_path / "out/export_receipt.json").read_text())
    assert written["inputs"]["base"]["files"]["model.safetensors"]["sha256"]
    assert written["inputs"]["base"]["name"] == base.name  # not the whole path
    assert set(written["outputs"]) >= {"config.json", "tokenizer.json", "generation_config.json"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


@pytest.mark.parametrize("config", [VeraConfig(r=4, **SOME), OFTConfig(oft_block_size=4, **SOME)])
def test_other_types_go_through_memory(config, base, adapter_of, tmp_path):
    receipt = merge_adapter(base, adapter_of(base, config), tmp_path / "out")
    assert f"whole model in memory, because {type(config).__name__} " in receipt.notes[0]
    assert receipt.verification["tokens_equal"]


def test_new_tokens_and_dtype(untied, tmp_path, adapter_of):
    model = AutoModelForCausalLM.from_pretrained(str(untied))
    model.resize_token_embeddings(392, mean_resizing=False)
    larger = tmp_path / "larger"
    model.save_pretrained(larger)
    adapter = adapter_of(larger, UNTIED["both"])
    merge_adapter(untied, adapter, tmp_path / "out", dtype="fp16", verify="streamed")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["dtype"]) == (392, "float16")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged["lm_head.weight"].shape == (392, 32)
    assert merged["model.norm.weight"].dtype == torch.float16


def test_a_wrong_merge_is_not_published(base, adapter_of, tmp_path, monkeypatch):
    adapter = adapter_of(base, LoraConfig(**ALL))
    own = merge_layers.MergedWeights.read

    def wrong(self, name):
        tensor = own(self, name)
        return tensor * 1.5 if name.endswith("layers.1.mlp.up_proj.weight") else tensor

    monkeypatch.setattr(merge_layers.MergedWeights, "read", wrong)
    for how in ("loaded", "streamed"):
        with pytest.raises(ExportError, match="does not answer like its source.*logits differ"):
            merge_adapter(base, adapter, tmp_path / "out", verify=how)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_another_model(base, adapter_of, tmp_path):
    wider = save_base(tmp_path / "wider", hidden_size=64)
    adapter = adapter_of(wider, LoraConfig(**ALL))
    with pytest.raises(ExportError, match="does not belong to this base model: .* is .* there and"):
        merge_adapter(base, adapter, tmp_path / "out")
    deeper = save_base(tmp_path / "deeper", num_layers=3)
    shutil.rmtree(adapter)
    with pytest.raises(ExportError, match="it has base_model.model.model.layers.2"):
        merge_adapter(base, adapter_of(deeper, LoraConfig(**ALL)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_inputs(base, adapter_of, tmp_path):
    adapter = adapter_of(base, LoraConfig(**ALL))
    out = tmp_path / "out"
    for model, folder, message in (
        (tmp_path / "nothing", adapter, "no model folder"),
        (tmp_path, adapter, "is no model folder"),
        (adapter, adapter, "holds an adapter, not a model"),
        (base, base, "holds a whole model"),
        (base, tmp_path / "nothing", "no adapter folder"),
    ):
        with pytest.raises(ExportError, match=message):
            merge_adapter(model, folder, out)
    with pytest.raises(ExportError, match="'5 apples' is no size"):
        merge_adapter(base, adapter, out, max_shard_size="5 apples")
    with pytest.raises(ExportError, match="verify is 'perhaps'; allowed: auto"):
        merge_adapter(base, adapter, out, verify="perhaps")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ExportError, match="adapter_model.bin is pickled and not opened"):
        merge_adapter(base, adapter, out)


def test_a_quantised_base(base, adapter_of, tmp_path):
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"is quantised \(bitsandbytes\), and a merge needs the"):
        merge_adapter(quantised, adapter_of(base, LoraConfig(**ALL)), tmp_path / "out")


def test_what_cannot_be_merged(base, adapter_of, tmp_path):
    adapter = adapter_of(base, LoraConfig(lora_bias=True, **ALL))
    with pytest.raises(ExportError, match="biases .lora_bias. on layers without one"):
        merge_adapter(base, adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(str(base))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ExportError, match="adds virtual tokens to the prompt"):
        merge_adapter(base, tmp_path / "prompt", tmp_path / "out")


def test_a_broken_adapter(base, adapter_of, tmp_path):
    adapter = adapter_of(base, LoraConfig(**ALL))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] * float("nan")}, file)
    with pytest.raises(ExportError, match="is not finite after the merge"):
        merge_adapter(base, adapter, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ExportError, match="is cut short"):
        merge_adapter(base, adapter, tmp_path / "out")
