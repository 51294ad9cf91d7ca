"""ChatTemplate: prompts, stop tokens, and what a template leaves out."""

import pickle
from types import SimpleNamespace

import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.templates import ChatTemplate, TemplateError, apply_template, stop_token_ids

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "content": "42"}


def test_prompt_is_the_beginning_of_the_whole():
    template = ChatTemplate(tiny_tokenizer())
    assert (
        template.render_prompt(CHAT[:1])
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = template.prompt_ids(CHAT[:1])
    assert template.encode(CHAT).input_ids[: len(prompt)].tolist() == prompt


def test_stop_tokens_are_the_templates_eos_and_the_models():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    template = ChatTemplate(tokenizer)
    assert template.end_token_ids == [2]  # <|im_end|>, written by the template
    assert template.stop_token_ids() == [2, 0]
    assert template.stop_token_ids(SimpleNamespace(eos_token_id=[7, 2])) == [2, 0, 7]
    assert stop_token_ids(tokenizer) == [2, 0]
    assert stop_token_ids(tiny_tokenizer(None), SimpleNamespace(eos_token_id=9)) == [2, 9]


def test_a_tokenizer_without_template_names_what_to_do():
    with pytest.raises(TemplateError, match="no chat template.*template='chatml'"):
        ChatTemplate(tiny_tokenizer(None))


def test_tool_calls_that_the_template_does_not_write_stop_the_run():
    template = ChatTemplate(tiny_tokenizer())
    assert template.shows == {"system": True, "tool_calls": False, "tool": True, "tools": False}
    with pytest.raises(TemplateError, match=r"message 1 \(assistant\) holds tool calls"):
        template.layout([CHAT[0], CALL, RESULT, CHAT[1]])


def test_a_system_prompt_that_the_template_drops_stops_the_run():
    template = ChatTemplate(
        tiny_tokenizer("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    )
    with pytest.raises(TemplateError, match="holds a system prompt"):
        template.layout([{"role": "system", "content": "s"}, *CHAT])


def test_tool_turns_with_a_template_that_writes_them():
    tokenizer = apply_template(tiny_tokenizer(None), "chatml")
    template = ChatTemplate(tokenizer)
    assert all(template.shows.values())
    layout = template.layout([CHAT[0], CALL, RESULT, CHAT[1]])
    assert [layout.text[s.start : s.end] for s in layout.spans] == [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "Hello<|im_end|>",
    ]
    assert "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n" in layout.text


def test_unknown_train_on():
    with pytest.raises(ValueError, match="train_on='answers' is unknown; allowed: 'assistant'"):
        ChatTemplate(tiny_tokenizer()).layout(CHAT, train_on="answers")


def test_it_can_be_sent_to_a_worker():
    template = pickle.loads(pickle.dumps(ChatTemplate(tiny_tokenizer())))
    assert template.encode(CHAT).input_ids.tolist() == (
        ChatTemplate(tiny_tokenizer()).encode(CHAT).input_ids.tolist()
    )
