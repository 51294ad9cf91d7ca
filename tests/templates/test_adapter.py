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
    left_out = {kind for kind, shown in template.shows.items() if not shown}
    assert left_out == {"tool_calls", "tools", "thinking"}
    with pytest.raises(TemplateError, match=r"message 1 \(assistant\) holds tool calls"):
        template.layout([CHAT[0], CALL, RESULT, CHAT[1]])


def test_a_system_prompt_that_the_template_drops_stops_the_run():
    template = ChatTemplate(
        tiny_tokenizer("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    )
    with pytest.raises(TemplateError, match="holds a system prompt"):
        template.layout([{"role": "system", "content": "s"}, *CHAT])


def test_a_template_that_takes_text_only_as_parts_is_given_parts():
    # As SmolVLM's: a plain string would be walked through letter by letter, and nothing written.
    template = ChatTemplate(
        tiny_tokenizer(
            "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
            "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
    )
    question, answer = (message["content"] for message in CHAT)
    layout = template.layout(CHAT)
    assert layout.text == f"user:{question}<|im_end|>assistant:{answer}<|im_end|>"
    assert [layout.text[s.start : s.end] for s in layout.spans] == [f"{answer}<|im_end|>"]
    assert template.stop_token_ids() == [2]


def test_a_template_that_ends_the_last_turn_with_a_token_of_its_own():
    # As gpt-oss's: <|return|> behind the last answer where earlier ones have <|end|>.
    template = ChatTemplate(
        tiny_tokenizer(
            "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
            "{% if loop.last and m.role == 'assistant' and not add_generation_prompt %}<|im_end|>"
            "{% else %}<|endoftext|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
        )
    )
    assert template.final_tail == ""
    layout = template.layout(CHAT)
    assert [layout.text[s.start : s.end] for s in layout.spans] == ["Hello<|im_end|>"]
    with pytest.raises(TemplateError, match="(?s)at message 1 .*Set train_on='last'"):
        template.layout([*CHAT, *CHAT])


def test_a_prompt_that_opens_a_thought_the_answer_does_not_go_on_with():
    template = ChatTemplate(
        tiny_tokenizer(
            "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}assistant:<think>{% endif %}"
        )
    )
    with pytest.raises(TemplateError, match=r"opens something \(such as <think>\)"):
        template.layout(CHAT)


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


THOUGHT = {"role": "assistant", "content": "Hello", "reasoning_content": "They greet."}


def learnt(template, chat, **options):
    layout = template.layout(chat, **options)
    return [layout.text[s.start : s.end] for s in layout.spans]


def test_thinking_is_read_and_not_learnt_unless_asked():
    template = ChatTemplate(apply_template(tiny_tokenizer(None), "chatml"))
    assert "<think>\nThey greet.\n</think>" in template.render([CHAT[0], THOUGHT])
    assert learnt(template, [CHAT[0], THOUGHT, *CHAT]) == [
        "<think>\n",
        "\n</think>\n\nHello<|im_end|>",
        "Hello<|im_end|>",
    ]
    assert learnt(template, [CHAT[0], THOUGHT], train_thinking=True) == [
        "<think>\nThey greet.\n</think>\n\nHello<|im_end|>"
    ]
    assert learnt(template, [CHAT[0], THOUGHT], train_on="all")[0].startswith("<|im_start|>user")


def test_thinking_that_repeats_in_the_answer_is_still_found():
    template = ChatTemplate(apply_template(tiny_tokenizer(None), "chatml"))
    same = {"role": "assistant", "content": "aa", "reasoning_content": "aa"}
    assert learnt(template, [CHAT[0], same]) == ["<think>\n", "\n</think>\n\naa<|im_end|>"]


def test_thinking_with_a_tool_call():
    template = ChatTemplate(apply_template(tiny_tokenizer(None), "chatml"))
    assert learnt(
        template, [CHAT[0], {**CALL, "reasoning_content": "Ask f."}, RESULT, CHAT[1]]
    ) == [
        "<think>\n",
        '\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "Hello<|im_end|>",
    ]


def test_thinking_that_the_template_drops():
    template = ChatTemplate(tiny_tokenizer())
    assert learnt(template, [CHAT[0], THOUGHT]) == ["Hello<|im_end|>"]
    with pytest.raises(TemplateError, match="reasoning_content that is to be learnt"):
        template.layout([CHAT[0], THOUGHT], train_thinking=True)


def test_thinking_whose_place_cannot_be_told():
    template = ChatTemplate(
        tiny_tokenizer(
            "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}"
            "{{ m.reasoning_content | length }}{{ m.reasoning_content }}{% endif %}"
            "{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
    )
    with pytest.raises(TemplateError, match="the place of its reasoning_content cannot be told"):
        template.layout([CHAT[0], THOUGHT])
