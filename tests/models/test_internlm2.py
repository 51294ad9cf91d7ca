"""InternLM2 as published: the same logits in the form of Llama, without its code."""

import json

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.internlm2_folder import CONFIG, write_internlm2_folder
from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite import load_causal_lm, load_tokenizer
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.hub import resolve_model_path
from xtuner_lite.models.internlm2 import join_wqkv, split_wqkv, to_llama_config
from xtuner_lite.models.internlm2_files import convert_internlm2, restore_internlm2
from xtuner_lite.models.shards import WeightFiles


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setenv("XTUNER_LITE_HOME", str(tmp_path / "home"))


def published_logits(weights, config, ids):
    """Logits float [T, V] of token ids [T], by the formulas of the published architecture.

    RMSNorm(x) = w x / sqrt(mean(x^2) + eps). wqkv's output is [T, kv_heads, groups + 2, head_dim]:
    the queries of a group, its key, its value. Rotary: x cos + rotate_half(x) sin with angles
    t / base^(2i / D). Dynamic NTK: beyond max_position_embeddings P, at length T, base becomes
    base (s T / P - (s - 1))^(D / (D - 2)). SwiGLU: w2(silu(w1 x) * w3 x).
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, groups, length = config["hidden_size"] // heads, heads // kv_heads, len(ids)

    def norm(x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])
        return weights[name + ".weight"] * (x * scale)

    def linear(x, name):
        return functional.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    base, positions = config["rope_theta"], torch.arange(length).float()
    scaling, limit = config["rope_scaling"], config["max_position_embeddings"]
    if scaling and scaling["type"] == "dynamic" and length > limit:
        factor = scaling["factor"]
        base = base * (factor * length / limit - (factor - 1)) ** (dim / (dim - 2))
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    angles = positions[:, None] / base ** (torch.arange(0, dim, 2) / dim)
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angles.cos(), angles.sin()))

    def rotate(x):  # [T, heads, D]
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    x = weights["model.tok_embeddings.weight"][ids]
    causal = torch.full((length, length), float("-inf")).triu(1)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        h = linear(norm(x, layer + "attention_norm"), layer + "attention.wqkv")
        h = h.view(length, kv_heads, groups + 2, dim)
        query = rotate(h[:, :, :groups].reshape(length, heads, dim))
        key = rotate(h[:, :, -2]).repeat_interleave(groups, 1)
        value = h[:, :, -1].repeat_interleave(groups, 1)
        scores = torch.einsum("thd,shd->hts", query, key) / dim**0.5 + causal
        seen = torch.einsum("hts,shd->thd", scores.softmax(-1), value)
        x = x + linear(seen.reshape(length, -1), layer + "attention.wo")
        h = norm(x, layer + "ffn_norm")
        gate = functional.silu(linear(h, layer + "feed_forward.w1"))
        x = x + linear(gate * linear(h, layer + "feed_forward.w3"), layer + "feed_forward.w2")
    head = "model.tok_embeddings" if config["tie_word_embeddings"] else "output"
    return linear(norm(x, "model.norm"), head)


CASES = {
    "as published": {},
    "pickled shards": {"pickled": True},
    "one file": {"shards": 1},
    "bias": {"bias": True},
    "tied": {"tie_word_embeddings": True},
    "one query head per key": {"num_key_value_heads": 4},
    "linear scaling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "no scaling": {"rope_scaling": None},
}


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_published_formulas(case, tmp_path):
    weights = write_internlm2_folder(tmp_path / "internlm2", **CASES[case])
    config = json.loads((tmp_path / "internlm2/config.json").read_text())
    model = load_causal_lm(tmp_path / "internlm2").eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    for length in (7, 100):  # within and beyond the 64 positions of the config
        ids = torch.randint(0, config["vocab_size"], (length,))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        torch.testing.assert_close(
            logits, published_logits(weights, config, ids), atol=2e-4, rtol=1e-4
        )


def test_wqkv_is_split_by_key_value_head_and_joined_again():
    # 2 key-value heads, 2 query heads each, head_dim 1: rows q q k v, q q k v.
    rows = torch.tensor([[10.0], [11], [20], [30], [12], [13], [21], [31]])
    query, key, value = split_wqkv(rows, 4, 2)
    assert query.flatten().tolist() == [10, 11, 12, 13]
    assert key.flatten().tolist() == [20, 21]
    assert value.flatten().tolist() == [30, 31]
    assert torch.equal(join_wqkv(query, key, value, 2), rows)


def test_the_form_is_made_once_and_again_when_the_source_changes(tmp_path):
    source = tmp_path / "internlm2-chat-1_8b"
    write_internlm2_folder(source)
    first = resolve_model_path(source)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert first.name.startswith("internlm2-chat-1_8b-llama-")
    assert resolve_model_path(source) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert resolve_model_path(source, as_published=True) == source.resolve()
    write_internlm2_folder(source, seed=1, rope_theta=10000)
    assert resolve_model_path(source) != first


def test_a_converted_folder_opens_in_plain_transformers(tmp_path):
    write_internlm2_folder(tmp_path / "published", torch_dtype="bfloat16")
    folder = convert_internlm2(tmp_path / "published", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == 1000000  # older readers look here
    assert config["rope_scaling"]["rope_type"] == "dynamic"
    assert "auto_map" not in config
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert model.config.rope_parameters["rope_theta"] == 1000000
    assert model.config.rope_parameters["factor"] == 2.0
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    stops = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model.generation_config.eos_token_id == stops
    assert (folder / "tokenizer.model").is_file()
    assert not list(folder.glob("*.py"))


def test_it_trains_and_its_checkpoint_opens_in_plain_transformers(tmp_path):
    write_internlm2_folder(tmp_path / "published")
    tokenizer = load_tokenizer(tmp_path / "published")
    batch = tiny_batch([tiny_segments(5, 6)])
    ids = torch.tensor([[1, 9, 8, 7]])

    full = SupervisedFinetune(load_causal_lm(tmp_path / "published"), tokenizer=tokenizer)
    step(full, batch)
    full.save_pretrained(tmp_path / "full")
    saved = AutoModelForCausalLM.from_pretrained(str(tmp_path / "full"))
    torch.testing.assert_close(saved(ids).logits, full.eval().llm(ids).logits)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert saved.generation_config.eos_token_id == ends

    lora = SupervisedFinetune(
        load_causal_lm(tmp_path / "published"), lora=LoraConfig(r=2), tokenizer=tokenizer
    )
    step(lora, batch)
    lora.save_pretrained(tmp_path / "lora")
    from peft import AutoPeftModelForCausalLM

    # Its base is the Llama form, which exists as a folder: nothing else is needed.
    reopened = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "lora"))
    torch.testing.assert_close(reopened(ids).logits, lora.eval().llm(ids).logits)
    assert not torch.equal(reopened(ids).logits, saved(ids).logits)


def step(method, batch):
    out = method.train()(batch)
    out.loss_sum.backward()
    torch.optim.SGD(method.trainable_parameters().values(), lr=0.1).step()


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"tie_word_embeddings": True}])
def test_there_and_back_again(changes, tmp_path):
    weights = write_internlm2_folder(tmp_path / "published", **changes)
    convert_internlm2(tmp_path / "published", tmp_path / "llama")
    load_causal_lm(tmp_path / "llama").save_pretrained(tmp_path / "saved")  # transformers 5's keys
    for number, form in enumerate(("llama", "saved")):
        back = restore_internlm2(
            tmp_path / form, tmp_path / f"back{number}", like=tmp_path / "published"
        )
        with WeightFiles(back) as files:
            assert files.names == sorted(weights)
            assert all(torch.equal(files.get(name), weights[name]) for name in weights)
        published = json.loads((tmp_path / "published/config.json").read_text())
        config = json.loads((back / "config.json").read_text())
        assert {k: config[k] for k in published if k != "torch_dtype"} == {
            k: published[k] for k in published if k != "torch_dtype"
        }
        assert (back / "modeling_internlm2.py").is_file()


def test_a_pickle_that_is_more_than_tensors_is_not_opened(tmp_path):
    write_internlm2_folder(tmp_path / "published", pickled=True, shards=1)
    (tmp_path / "published/pytorch_model.bin.index.json").unlink()
    torch.save({"model.norm.weight": Loud()}, tmp_path / "published/pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_causal_lm(tmp_path / "published")
    assert not Loud.was_opened


class Loud:
    """What a malicious file would hold."""

    was_opened = False

    def __reduce__(self):
        return setattr, (Loud, "was_opened", True)


def test_what_is_no_language_model_as_published_is_refused(tmp_path):
    weights = write_internlm2_folder(tmp_path / "reward", shards=1)
    from safetensors.torch import save_file

    (tmp_path / "reward/model.safetensors.index.json").unlink()
    (tmp_path / "reward/model-00001-of-00001.safetensors").unlink()
    weights["v_head.weight"] = weights.pop("output.weight")
    save_file(weights, str(tmp_path / "reward/model.safetensors"))
    with pytest.raises(ValueError, match="missing: output.weight; unknown: v_head.weight"):
        load_causal_lm(tmp_path / "reward")
    assert not list((tmp_path / "home/models").glob("*/config.json"))  # no half folder
    write_internlm2_folder(tmp_path / "heads")
    config = json.loads((tmp_path / "heads/config.json").read_text())
    (tmp_path / "heads/config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(ValueError, match="has 64 rows, the config asks for 96"):
        load_causal_lm(tmp_path / "heads")
    with pytest.raises(ValueError, match="rope_scaling is .*'yarn'.*known types: dynamic, linear"):
        to_llama_config({**CONFIG, "vocab_size": 9, "rope_scaling": {"type": "yarn", "factor": 2}})
    with pytest.raises(ValueError, match="lacks vocab_size"):
        to_llama_config(CONFIG)
    tiny_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="needs no conversion"):
        convert_internlm2(tmp_path / "llama", tmp_path / "out")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_internlm2(tmp_path / "heads", tmp_path / "llama")


def test_a_missing_shard_is_named(tmp_path):
    write_internlm2_folder(tmp_path / "published")
    (tmp_path / "published/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors, which is not"):
        load_causal_lm(tmp_path / "published")
