"""Templates of text that read parts: the header and its fast form say the same."""

import random

import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.templates import ChatTemplate, RowRefused
from xtuner_lite.templates.content_parts import reading_parts, split_header

TEXTS = ("", "a", " a", "b ", "\n", "c\n", "two words", "\ttab", "it's {{ 1 }}", "猫")


def test_the_header_is_found_again():
    for token in ("<image>", "<|it's|>", "back\\slash"):
        template = reading_parts("{{ messages[0].content }}", token)
        assert split_header(template) == (token, "{{ messages[0].content }}")
    assert split_header("{{ x }}") == (None, "{{ x }}")


@pytest.mark.parametrize("token", ["<image>", "<|it's|>"])
def test_both_ways_write_the_same(token):
    rng = random.Random(0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = reading_parts(tokenizer.chat_template, token)
    template = ChatTemplate(tokenizer)
    for _ in range(300):
        parts = [
            {"type": "image"} if rng.random() < 0.4 else {"type": "text", "text": rng.choice(TEXTS)}
            for _ in range(rng.randint(0, 5))
        ]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
        theirs = tokenizer.apply_chat_template(messages, tokenize=False)
        assert template.render(messages) == theirs


def test_a_line_ends_between_image_and_text_by_hand():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = reading_parts("{{ messages[0].content }}", "<i>")
    template = ChatTemplate(tokenizer)
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    assert template.render([{"role": "user", "content": [image, text]}]) == "<i>\nWhat?"
    assert template.render([{"role": "user", "content": [text, image]}]) == "What?\n<i>"
    assert template.render([{"role": "user", "content": [image, image]}]) == "<i><i>"
    assert template.render([{"role": "user", "content": "plain"}]) == "plain"


def test_an_unknown_part_is_refused_either_way():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = reading_parts(tokenizer.chat_template, "<image>")
    messages = [{"role": "user", "content": [{"type": "video"}]}]
    with pytest.raises(RowRefused, match="content part of type video is not known"):
        ChatTemplate(tokenizer).render(messages)
    with pytest.raises(Exception, match="content part of type video is not known"):
        tokenizer.apply_chat_template(messages, tokenize=False)
