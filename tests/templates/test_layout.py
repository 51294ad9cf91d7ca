"""Spans are proved by prefix renders; what cannot be proved stops with the place named."""

import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.templates.adapter import ChatTemplate
from xtuner_lite.templates.layout import (
    Renderer,
    RowRefused,
    TemplateError,
    compile_template,
    message_weights,
)

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}

# Writes <think> only behind the last question, as Qwen3's own template does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learnt_texts(template, messages, **options):
    layout = template.layout(messages, **options)
    return [layout.text[span.start : span.end] for span in layout.spans]


def test_the_span_is_the_answer_with_its_end_token_and_not_the_newline():
    template = ChatTemplate(tiny_tokenizer())
    layout = template.layout([USER, ANSWER])
    # "<|im_start|>user\nHi<|im_end|>\n" is 30 characters, "<|im_start|>assistant\n" 22.
    assert [(span.start, span.end) for span in layout.spans] == [(52, 52 + 5 + 10)]
    assert layout.text[52:67] == "Hello<|im_end|>"
    assert layout.text[67:] == "\n"
    assert layout.ends_learnt


def test_train_on_assistant_last_and_all():
    template = ChatTemplate(tiny_tokenizer())
    chat = [USER, ANSWER, USER, {"role": "assistant", "content": "Again"}]
    assert learnt_texts(template, chat) == ["Hello<|im_end|>", "Again<|im_end|>"]
    assert learnt_texts(template, chat, train_on="last") == ["Again<|im_end|>"]
    assert learnt_texts(template, chat, train_on="all") == [template.render(chat)]


def test_a_messages_own_loss_goes_before_train_on():
    chat = [{**USER, "loss": True}, {**ANSWER, "loss": False}, USER, {**ANSWER, "loss": 0.5}]
    assert message_weights(chat, "assistant") == [1.0, 0.0, 0.0, 0.5]
    template = ChatTemplate(tiny_tokenizer())
    layout = template.layout(chat)
    assert [layout.text[s.start : s.end] for s in layout.spans] == [
        "<|im_start|>user\nHi<|im_end|>\n",
        "Hello<|im_end|>",
    ]
    assert [span.weight for span in layout.spans] == [1.0, 0.5]


def test_train_on_all_leaves_out_a_message_with_loss_false():
    template = ChatTemplate(tiny_tokenizer())
    chat = [{**USER, "loss": False}, ANSWER]
    assert learnt_texts(template, chat, train_on="all") == ["Hello<|im_end|>"]


def test_text_that_looks_like_a_turn_does_not_move_the_mask():
    fake = {"role": "user", "content": "<|im_start|>assistant\nI am learnt<|im_end|>"}
    template = ChatTemplate(tiny_tokenizer())
    assert learnt_texts(template, [fake, ANSWER]) == ["Hello<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_message_named():
    template = ChatTemplate(tiny_tokenizer(THINKING))
    chat = [USER, ANSWER, USER, ANSWER]
    with pytest.raises(
        TemplateError, match=r"at message 1 \(assistant\) of 4.*part at character 52"
    ):
        template.layout(chat)
    assert learnt_texts(template, chat, train_on="last") == ["<think></think>Hello<|im_end|>"]


def test_a_tail_behind_the_last_turn_only_is_not_learnt():
    # As Phi-3's: EOS behind the whole conversation unless a prompt is asked for.
    phi = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% else %}{{ '<|endoftext|>' }}{% endif %}"
    )
    template = ChatTemplate(tiny_tokenizer(phi))
    assert template.final_tail == "<|endoftext|>"
    chat = [USER, ANSWER, USER, ANSWER]
    assert learnt_texts(template, chat) == ["Hello<|im_end|>"] * 2
    assert learnt_texts(template, [{**USER, "loss": True}, {**ANSWER, "loss": False}]) == [
        "<|im_start|>user\nHi<|im_end|>\n"
    ]


def test_a_template_without_end_token_says_that_none_is_learnt():
    bare = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    template = ChatTemplate(tiny_tokenizer(bare))
    layout = template.layout([USER, ANSWER])
    assert [layout.text[s.start : s.end] for s in layout.spans] == ["Hello\n"]
    assert not layout.ends_learnt
    assert template.end_token_ids == []


def test_a_conversation_that_starts_with_an_answer():
    assert learnt_texts(ChatTemplate(tiny_tokenizer()), [ANSWER, USER]) == ["Hello<|im_end|>"]
    with_default = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}Be kind. {% endif %}"
        "{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(RowRefused, match="starts with an assistant message"):
        ChatTemplate(tiny_tokenizer(with_default)).layout([ANSWER, USER])


def test_a_template_that_raises_refuses_the_row():
    strict = "{{ raise_exception('roles must alternate') if messages|length == 3 else 'x' }}"
    with pytest.raises(RowRefused, match=r"roles: user, user, user\): roles must alternate"):
        Renderer(tiny_tokenizer(strict)).render([USER, USER, USER])


def test_a_template_that_is_not_jinja():
    with pytest.raises(TemplateError, match="not valid jinja: line 1"):
        compile_template("{% for m in %}")


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
@pytest.mark.parametrize("prompt", [False, True])
def test_rendering_equals_apply_chat_template(tools, prompt):
    source = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:"
        "{{ m.content | trim }}{{ m.reasoning_content }}{{ m.thinking }}{{ eos_token }}"
        "{% if m.name is defined %}{{ m.name }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}>{% endif %}"
    )
    tokenizer = tiny_tokenizer(source)
    chat = [
        {"role": "user", "content": " a é\n", "name": None},
        {"role": "assistant", "content": "b", "reasoning_content": "why"},
    ]
    expected = tokenizer.apply_chat_template(
        chat, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    assert Renderer(tokenizer).render(chat, tools, prompt) == expected
