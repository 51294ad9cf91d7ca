"""Presets, dicts of parts and .jinja files become the tokenizer's own template."""

import pytest

from tests.tiny import CHATML, tiny_tokenizer
from xtuner_lite.registry import TEMPLATES, describe
from xtuner_lite.templates import ChatTemplate, TemplateError, apply_template
from xtuner_lite.templates.apply import preset
from xtuner_lite.templates.compile import to_jinja
from xtuner_lite.templates.parts import TemplateParts

CHAT = [
    {"role": "system", "content": "Be \"brief\".\n{input} {% x %} {{ y }} '\\n'"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Yes"},
]


def tokenizer_for(name: str):
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_tokens(list(preset(name).tokens), special_tokens=True)
    return apply_template(tokenizer, name)


def test_every_preset_has_a_description():
    assert all(description for _, _, description in describe(TEMPLATES))


def test_llama3_by_hand():
    assert ChatTemplate(tokenizer_for("llama3_chat")).render_prompt(CHAT[1:4]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_qwen_has_its_default_system_prompt():
    text = ChatTemplate(tokenizer_for("qwen_chat")).render(CHAT[1:3])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_chatml_is_what_is_exported(tmp_path):
    tokenizer = apply_template(tiny_tokenizer(None), "chatml")
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    expected = tiny_tokenizer(CHATML).apply_chat_template(CHAT, tokenize=False)
    assert again.apply_chat_template(CHAT, tokenize=False) == expected


def test_none_keeps_the_tokenizers_own_or_names_the_presets():
    assert apply_template(tiny_tokenizer(), None).chat_template == CHATML
    with pytest.raises(TemplateError, match="none was named.*chatml.*default, gemma"):
        apply_template(tiny_tokenizer(None), None)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(KeyError, match="unknown template 'qwen2_chat'.*did you mean 'qwen_chat'"):
        apply_template(tiny_tokenizer(), "qwen2_chat")


def test_tokens_that_the_tokenizer_lacks_are_named():
    with pytest.raises(TemplateError, match=r"needs the tokens <start_of_turn>, <end_of_turn>"):
        apply_template(tiny_tokenizer(), "gemma")


def test_a_jinja_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    assert apply_template(tiny_tokenizer(), str(file)).chat_template == "{{ messages[0].content }}"
    with pytest.raises(FileNotFoundError, match=r"in that folder: mine.jinja"):
        apply_template(tiny_tokenizer(), str(tmp_path / "other.jinja"))
    file.write_text("{% if %}")
    with pytest.raises(TemplateError, match="not valid jinja"):
        apply_template(tiny_tokenizer(), str(file))


def test_a_dict_in_our_words_and_in_xtuners():
    ours = apply_template(
        tiny_tokenizer(None), dict(user="Q: {input}\n", assistant="A:", suffix="{eos}", sep="\n")
    )
    theirs = apply_template(
        tiny_tokenizer(None),
        dict(INSTRUCTION="Q: {input}\nA:", SUFFIX="<|im_end|>", SUFFIX_AS_EOS=True, SEP="\n"),
    )
    expected = "Q: Hi\nA:Hello<|im_end|>\nQ: More\nA:Yes<|im_end|>\n"
    assert ChatTemplate(ours).render(CHAT[1:]) == expected
    assert ChatTemplate(theirs).render(CHAT[1:]) == expected


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(user="{input}", assistant="A:"), "missing.*suffix"),
        (dict(user="{input}", assistant="", suffix="x", prefix=""), r"unknown \['prefix'\]"),
        (dict(user="Q:", assistant="", suffix="x"), r"must hold \{input\} exactly once"),
        (dict(user="{input}", assistant=3, suffix="x"), "assistant=3 is not a string"),
        (dict(instruction="Q", suffix="x"), r"instruction='Q' must be a string that holds"),
    ],
)
def test_wrong_parts(parts, message):
    with pytest.raises(TemplateError, match=message):
        apply_template(tiny_tokenizer(), parts)


def test_a_template_of_another_type():
    with pytest.raises(TypeError, match="template=3 is a int; allowed"):
        apply_template(tiny_tokenizer(), 3)


def test_roles_that_the_parts_cannot_write_are_refused():
    parts = TemplateParts(user="{input}", assistant=">", suffix="{eos}")
    tokenizer = tiny_tokenizer(to_jinja(parts))
    with pytest.raises(ValueError, match="cannot write system messages"):
        ChatTemplate(tokenizer).render(CHAT)
    with pytest.raises(ValueError, match="cannot write tool results"):
        ChatTemplate(tokenizer).render([CHAT[1], {"role": "tool", "content": "1"}])
