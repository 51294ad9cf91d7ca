"""GGUF: the file read back is the model, in its settings, numbers, tokenizer and template."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen3Config

from tests.export.conftest import save_base
from tests.internlm2_folder import write_internlm2_folder
from tests.tiny import tiny_tokenizer
from xtuner_lite.export import gguf_model
from xtuner_lite.export.gguf_file import export_gguf
from xtuner_lite.export.gguf_model import llama3_factors, rope_settings
from xtuner_lite.export.gguf_tokenizer import _QWEN2, add_tokenizer, pre_tokenizer_name
from xtuner_lite.export.publish import ExportError
from xtuner_lite.models.internlm2_files import convert_internlm2

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """bf16, rows of 64 numbers: two blocks."""
    folder = tmp_path_factory.mktemp("wide") / "helper"
    return save_base(folder, dtype=torch.bfloat16, hidden_size=64)


def fields_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_llama(wide, tmp_path, outtype):
    receipt = export_gguf(wide, tmp_path / "out", outtype=outtype)
    found = receipt.verification
    assert found["tokens_equal"]
    assert found["max_logit_difference"] < 1e-3
    # bf16 weights of this size fit into f16 exactly; 8 bits move logits
    assert (found["quantisation"]["max_logit_difference"] > 1e-3) is (outtype == "q8_0")
    fields = fields_of(tmp_path / f"out/helper-{outtype.upper()}.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 16
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.chat_template"] == tiny_tokenizer().chat_template
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # three control tokens
    modelfile = (tmp_path / "out/Modelfile").read_text()
    assert modelfile.startswith(f"FROM ./helper-{outtype.upper()}.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert json.loads((tmp_path / "out/export_receipt.json").read_text())["what"] == "gguf"


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_qwen(kind, tmp_path):
    config = kind(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, head_dim=16,
        initializer_range=0.2, tie_word_embeddings=False, bos_token_id=None, eos_token_id=2,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    receipt = export_gguf(tmp_path / "model", tmp_path / "named.gguf", outtype="f32")
    assert receipt.verification["max_logit_difference"] < 1e-3
    assert (tmp_path / "named/named.gguf").is_file()


def test_internlm2_in_the_form_of_llama(tmp_path):
    write_internlm2_folder(tmp_path / "published")
    convert_internlm2(tmp_path / "published", tmp_path / "llama")
    receipt = export_gguf(tmp_path / "llama", tmp_path / "out", outtype="f32")
    assert receipt.verification["max_logit_difference"] < 1e-3
    assert "acts beyond 64 tokens only" in receipt.notes[0]
    fields = fields_of(tmp_path / "out/llama-F32.gguf")
    assert fields["llama.context_length"] == 64
    assert "llama.rope.scaling.type" not in fields


def test_a_wrong_file_is_not_published(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model, "_interleave", lambda tensor, heads: tensor)
    with pytest.raises(ExportError, match="does not answer like its source"):
        export_gguf(wide, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refused_models(wide, tmp_path):
    with pytest.raises(ExportError, match="outtype is 'q9'; allowed: f32"):
        export_gguf(wide, tmp_path / "out", outtype="q9")
    for change, message in (
        ({"model_type": "internlm2"}, "InternLM2: write it as Llama first"),
        ({"mlp_bias": True}, "biases in its MLP"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding window"),
    ):
        config = {**AutoConfig.from_pretrained(wide).to_dict(), **change}
        with pytest.raises(ExportError, match=message):
            gguf_model.architecture_of(config)


def test_llama3_frequencies():
    # transformers' own computation, of Llama 3.1's published numbers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model(
        "llama", hidden_size=128, num_attention_heads=1, max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    mine = llama3_factors(rope_settings(config.to_dict()), 128)
    torch.testing.assert_close(plain / mine, theirs, rtol=1e-4, atol=0)


def test_rope_settings_in_both_spellings():
    old = {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}}
    for config in (old, new):
        rope = rope_settings({**config, "max_position_embeddings": 9})
        assert (rope["theta"], rope["type"], rope["factor"]) == (7.0, "linear", 2.0)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
        (
            [{"type": "Digits", "individual_digits": True},
             {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
            "smollm",
        ),
        (
            [{"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated"},
             {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
            "qwen2",
        ),
    ],
)  # fmt: skip
def test_pre_tokenizers(steps, name):
    state = {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    assert pre_tokenizer_name(state) == name


def test_an_unknown_pre_tokenizer():
    with pytest.raises(ExportError, match="would cut text into other words"):
        pre_tokenizer_name({"pre_tokenizer": {"type": "Whitespace"}})


def test_sentencepiece_scores_follow_the_merges(tmp_path):
    """a+b is merged first (rank 0), then ab+c; a later merge that makes 'abc' changes nothing."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "c", "ab", "bc", "abc"]
    model = models.BPE(
        {text: i for i, text in enumerate(vocabulary)},
        [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")],
        byte_fallback=True, unk_token="<unk>",
    )  # fmt: skip
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    add_tokenizer(writer, tmp_path, tokenizer, 12)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = fields_of(tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]))
    assert (scores["ab"], scores["abc"], scores["bc"]) == (0.0, -1.0, -2.0)
    assert fields["tokenizer.ggml.token_type"] == [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 5]
