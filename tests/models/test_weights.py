"""Saved folders open with plain peft and transformers; what does not fit is named."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_batch, tiny_llama, tiny_segments, tiny_tokenizer
from xtuner_lite.methods.sft import SupervisedFinetune

IDS = torch.tensor([[5, 6, 7, 8]])


def trained(lora=None, **model):
    """A method after one step, so that its weights are not those it was built with."""
    torch.manual_seed(0)
    sft = SupervisedFinetune(tiny_llama(**model), lora=lora, tokenizer=tiny_tokenizer())
    optimizer = torch.optim.SGD(sft.parameters(), lr=0.1)
    for _ in range(2):  # LoRA's A moves in the second step only
        sft(tiny_batch([tiny_segments(8)])).loss_sum.backward()
        optimizer.step()
    return sft.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def base_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="packed_sdpa"
    )
    assert model.name_or_path == str(tmp_path / "base")
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2),
        LoraConfig(r=2, modules_to_save=["embed_tokens"]),
        LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "up_proj"]),
        LoraConfig(r=2, trainable_token_indices=[1, 2]),
    ],
    ids=["lora", "modules_to_save", "dora", "trainable_tokens"],
)
def test_adapter_opens_in_plain_peft(tmp_path, config):
    model = base_folder(tmp_path)
    torch.manual_seed(0)
    sft = SupervisedFinetune(model, lora=config)
    optimizer = torch.optim.SGD(sft.parameters(), lr=0.1)
    for _ in range(2):
        sft(tiny_batch([tiny_segments(8)])).loss_sum.backward()
        optimizer.step()
    sft.eval().save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(plain)
    plain = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain), logits(sft.llm), atol=1e-5, rtol=1e-5)
    assert (logits(plain) - before).abs().max() > 1e-3
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("tied", [True, False])
def test_model_opens_in_plain_transformers(tmp_path, tied):
    sft = trained(tie_word_embeddings=tied)
    sft.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), logits(sft.llm), atol=1e-6, rtol=1e-6)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    assert plain.generation_config.eos_token_id == 2
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()


def test_a_given_state_dict_is_what_is_saved(tmp_path):
    for lora in (None, LoraConfig(r=2)):
        sft = trained(lora)
        doubled = {name: tensor * 2 for name, tensor in sft.state_dict().items()}
        sft.save_pretrained(tmp_path, state_dict=doubled)
        file = tmp_path / ("adapter_model.safetensors" if lora else "model.safetensors")
        name, tensor = next((n, t) for n, t in load_file(file).items() if "q_proj" in n)
        own = sft.llm.state_dict()[name.replace("lora_A.", "lora_A.default.")]
        assert torch.equal(tensor, own * 2)
        assert len(doubled) == len(sft.state_dict())  # the caller's dict is not emptied


def test_large_models_are_saved_in_shards_and_read_back(tmp_path, monkeypatch):
    sft = trained()
    sft.llm.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other = SupervisedFinetune(tiny_llama(seed=1)).eval()
    other.load_pretrained(tmp_path)
    assert torch.equal(logits(other.llm), logits(sft.llm))


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, modules_to_save=["embed_tokens"])])
def test_load_pretrained_gives_the_saved_weights_back(tmp_path, lora):
    sft = trained(lora)
    sft.save_pretrained(tmp_path)
    other = SupervisedFinetune(tiny_llama(), lora=lora).eval()
    assert not torch.equal(logits(other.llm), logits(sft.llm))
    trainable = set(other.trainable_parameters())
    other.load_pretrained(tmp_path)
    assert torch.equal(logits(other.llm), logits(sft.llm))
    assert set(other.trainable_parameters()) == trainable
    if lora is None:
        assert other.llm.lm_head.weight is other.llm.model.embed_tokens.weight


def test_an_adapter_that_does_not_fit_is_named(tmp_path):
    trained(LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    other = SupervisedFinetune(tiny_llama(), lora=LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match=r"missing: .*k_proj.* and 1 more; unexpected: .*q_proj"):
        other.load_pretrained(tmp_path)
    wide = SupervisedFinetune(
        tiny_llama(hidden_size=64), lora=LoraConfig(r=2, target_modules=["q_proj"])
    )
    with pytest.raises(
        ValueError, match=r"other shape: .*lora_A.weight is \[2, 32\] there and \[2, 64\]"
    ):
        wide.load_pretrained(tmp_path)
    ranked = SupervisedFinetune(tiny_llama(), lora=LoraConfig(r=4, lora_alpha=16))
    with pytest.raises(
        ValueError, match="r is 2 there and 4 here; lora_alpha is 8 there and 16 here"
    ):
        ranked.load_pretrained(tmp_path)


def test_a_model_that_does_not_fit_is_named(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM: .*is .* there and"):
        SupervisedFinetune(tiny_llama(hidden_size=64)).load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: model.layers.2.*and 6 more"):
        SupervisedFinetune(tiny_llama(num_layers=3)).load_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(
        {**weights, "extra.weight": torch.zeros(1)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="missing: model.norm.weight; unexpected: extra.weight"):
        SupervisedFinetune(tiny_llama()).load_pretrained(tmp_path)


def test_the_wrong_kind_of_folder_is_named(tmp_path):
    full, adapter = (
        SupervisedFinetune(tiny_llama()),
        SupervisedFinetune(tiny_llama(), lora=LoraConfig(r=2)),
    )
    full.save_pretrained(tmp_path / "full")
    adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds an adapter: give the run lora"):
        full.load_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="it holds a whole model"):
        adapter.load_pretrained(tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="give a folder that holds one"):
        full.load_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="pickled adapter_model.bin files are not loaded"):
        adapter.load_pretrained(tmp_path / "empty")
