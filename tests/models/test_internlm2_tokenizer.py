"""InternLM2's tokenizer without its code: sentencepiece's own ids, published special tokens."""

import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from tests.internlm2_folder import NAMED, spm_bytes, write_internlm2_folder
from xtuner_lite import load_tokenizer
from xtuner_lite.models.internlm2_files import convert_internlm2
from xtuner_lite.models.internlm2_tokenizer import internlm2_tokenizer
from xtuner_lite.templates import ChatTemplate

MIXED = [
    "Who are you? 你是谁？",
    "我是小助手 helper，trained on 12345 questions.",
    "  two  spaces, 全角　空格\tand\n\nlines  ",
    "emoji 🙂 and rare 龘 characters: ñ é ß",
    "<0x0A> is text, ▁ too",
    "",
    " ",
    "法国的首都是巴黎。The capital of France is Paris.",
]


@pytest.fixture
def folder(tmp_path):
    write_internlm2_folder(tmp_path / "published")
    return tmp_path / "published"


@pytest.mark.parametrize("add_dummy_prefix", [False, True])
@pytest.mark.parametrize("remove_extra_whitespaces", [False, True])
@pytest.mark.parametrize("text", MIXED)
def test_ids_and_text_are_those_of_sentencepiece(
    folder, add_dummy_prefix, remove_extra_whitespaces, text
):
    spm = spm_bytes(
        add_dummy_prefix=add_dummy_prefix, remove_extra_whitespaces=remove_extra_whitespaces
    )
    (folder / "tokenizer.model").write_bytes(spm)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=spm)
    tokenizer = internlm2_tokenizer(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == theirs.encode(text)
    assert tokenizer.decode(ids) == theirs.decode(ids)
    assert tokenizer(text)["input_ids"] == [1, *ids]  # <s> in front, as published


def test_special_tokens_have_their_published_ids(tmp_path):
    write_internlm2_folder(tmp_path / "published", num_pieces=92544, num_hidden_layers=1)
    tokenizer = load_tokenizer(tmp_path / "published")
    assert len(tokenizer) == 92544
    assert tokenizer.convert_tokens_to_ids(list(NAMED)) == [
        92538,
        92539,
        92540,
        92541,
        92542,
        92543,
    ]
    assert tokenizer("<|im_start|>user\nWho<|im_end|>")["input_ids"][:2] == [1, 92543]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert ChatTemplate(tokenizer).stop_token_ids() == [92542, 2]
    assert tokenizer.decode([92543, 92542, 2], skip_special_tokens=True) == ""


def test_first_revisions_name_no_tokens_and_have_no_template(tmp_path):
    write_internlm2_folder(tmp_path / "a", has_template=False)
    named = load_tokenizer(tmp_path / "a")
    file = tmp_path / "a/tokenizer_config.json"
    settings = json.loads(file.read_text())
    for key in ("added_tokens_decoder", "additional_special_tokens"):
        del settings[key]
    file.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.convert_tokens_to_ids(list(NAMED)) == named.convert_tokens_to_ids(list(NAMED))
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello"}]
    text = "<s><|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text


def test_the_own_template_and_the_preset_write_the_same(folder):
    chat = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hello"},
    ]
    own, preset = load_tokenizer(folder), load_tokenizer(folder, template="internlm2_chat")
    assert own.chat_template != preset.chat_template
    first = ChatTemplate(own).encode(chat)
    second = ChatTemplate(preset).encode(chat)
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.learnt.tolist() == second.learnt.tolist()
    assert own.decode(first.input_ids[first.learnt]).rstrip("\n") == "Hello<|im_end|>"


def test_saved_and_reopened_it_is_the_same(folder, tmp_path):
    convert_internlm2(folder, tmp_path / "llama")
    tokenizer, reopened = load_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert reopened.chat_template == tokenizer.chat_template
    for text in MIXED:
        assert reopened(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert reopened.decode(reopened(text)["input_ids"]) == tokenizer.decode(
            tokenizer(text)["input_ids"]
        )
    settings = json.loads((tmp_path / "llama/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_settings_of_the_config_win(folder):
    assert load_tokenizer(folder, pad_token="<unk>").pad_token_id == 0
    assert load_tokenizer(folder, add_bos_token=False)("a")["input_ids"][0] != 1


def test_what_is_missing_is_named(folder):
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="is no BPE model"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.model"):
        load_tokenizer(folder)
