"""The one public way in."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig

from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import (
    choose_attention,
    load_causal_lm,
    load_tokenizer,
    split_adapter_path,
)
from xtuner_lite.registry import MODELS


@pytest.fixture
def folder(tmp_path):
    """A saved tiny chat model."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_loads_with_packed_attention_and_the_stored_dtype(folder):
    model = load_causal_lm(folder)
    assert model.config._attn_implementation == "packed_sdpa"
    assert model.dtype == torch.float32
    assert model.name_or_path == str(folder.resolve())
    assert load_causal_lm(folder, dtype="bfloat16", attn="eager").dtype == torch.bfloat16


def test_builds_by_name_from_a_config(folder):
    assert MODELS.build({"type": "load_causal_lm", "path": folder}).vocab_size == 384
    assert MODELS.build({"type": "load_tokenizer", "path": folder}).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama", {}, "packed_sdpa"),
        ("qwen3", {}, "packed_sdpa"),
        ("mistral", {}, "packed_sdpa"),
        ("gemma3_text", {}, "packed_sdpa"),
        ("gemma2", {}, None),  # its soft cap is beyond sdpa
        ("qwen3_next", {}, None),  # linear attention
        ("gpt_oss", {}, None),  # attention sinks
        ("llama4_text", {}, None),  # chunked attention
    ],
)
def test_auto_attention(name, settings, expected):
    assert choose_attention(AutoConfig.for_model(name, **settings)) == expected


def test_quantisation_is_refused_when_unknown(folder):
    with pytest.raises(ValueError, match="quantization is 'int4'; allowed: '4bit', '8bit'"):
        load_causal_lm(folder, quantization="int4")


def test_a_quantised_base_needs_an_adapter(folder):
    pytest.importorskip("bitsandbytes")
    model = load_causal_lm(folder, quantization="4bit")
    with pytest.raises(ValueError, match="quantised and lora is None"):
        SupervisedFinetune(model)


def test_a_model_that_is_no_causal_lm(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="a 'distilbert' model, which is no causal language model"):
        load_causal_lm(tmp_path)


def test_an_adapter_is_put_on_strictly(folder, tmp_path):
    sft = SupervisedFinetune(
        load_causal_lm(folder), lora=LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5)
    )
    sft.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[4, 5, 6]])
    model = load_causal_lm(folder, adapter=tmp_path / "adapter")
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, sft.eval().llm(ids).logits)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_causal_lm(folder, adapter=folder)
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="does not fit this model"):
        load_causal_lm(tmp_path / "wide", adapter=tmp_path / "adapter")


def test_an_adapter_folder_is_no_model(folder, tmp_path):
    SupervisedFinetune(load_causal_lm(folder), lora=LoraConfig(r=2)).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds an adapter.*its base model is .*base'"):
        load_causal_lm(tmp_path / "a")
    assert split_adapter_path(tmp_path / "a") == (str(folder.resolve()), tmp_path / "a")
    assert split_adapter_path(folder) == (str(folder), None)
    assert load_tokenizer(tmp_path / "a").eos_token == "<|im_end|>"  # the base model's
    (tmp_path / "a/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name its base model"):
        split_adapter_path(tmp_path / "a")


def test_a_missing_pad_token_is_chosen_but_never_eos_while_there_is_another(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|endoftext|>"
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|endoftext|>"  # nothing else is left


def test_a_template_replaces_the_tokenizers_own(folder):
    own = load_tokenizer(folder)
    assert own.chat_template == tiny_tokenizer().chat_template
    named = load_tokenizer(folder, template="chatml")
    assert named.chat_template != own.chat_template
    with pytest.raises(KeyError, match="chatml"):
        load_tokenizer(folder, template="chatmll")
