"""Learnt tokens cover exactly the learnt characters."""

import random

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from xtuner_lite.structures import IGNORE_INDEX
from xtuner_lite.templates.adapter import ChatTemplate
from xtuner_lite.templates.layout import Layout, Span, TemplateError
from xtuner_lite.templates.tokenise import encode_layouts, encode_text

PIECES = [
    "Who",
    " are",
    " you",
    "\n",
    " ",
    "é",
    "你好",
    "🙂",
    "<|im_end|>",
    "<|im_start|>",
    "x",
    ".",
]


def random_chat(rng: random.Random) -> list[dict]:
    chat = []
    for _ in range(rng.randint(1, 7)):
        role = rng.choice(["system", "user", "assistant"] if not chat else ["user", "assistant"])
        words = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))
        chat.append({"role": role, "content": words})
    return chat


def expected_parts(chat: list[dict]) -> list[tuple[str, bool]]:
    """(text, learnt) built by hand, the reference for ChatML."""
    parts = []
    for message in chat:
        parts.append((f"<|im_start|>{message['role']}\n", False))
        body = message["content"] + "<|im_end|>"
        parts.append((body, message["role"] == "assistant"))
        parts.append(("\n", False))
    return parts


def runs(tokenizer, encoded) -> list[tuple[str, bool]]:
    """Decoded runs of learnt and not learnt tokens."""
    borders = np.flatnonzero(np.diff(encoded.learnt)) + 1
    ids, kinds = np.split(encoded.input_ids, borders), np.split(encoded.learnt, borders)
    return [(tokenizer.decode(i), bool(k[0])) for i, k in zip(ids, kinds)]


def joined(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    merged: list[tuple[str, bool]] = []
    for text, learnt in parts:
        if merged and merged[-1][1] == learnt:
            merged[-1] = (merged[-1][0] + text, learnt)
        else:
            merged.append((text, learnt))
    return merged


def test_random_conversations_against_a_mask_built_by_hand():
    rng = random.Random(0)
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer)
    chats = [random_chat(rng) for _ in range(500)]
    for chat, encoded in zip(chats, template.encode_batch([(chat, None) for chat in chats])):
        assert runs(tokenizer, encoded) == joined(expected_parts(chat))
        labels = encoded.labels
        assert labels.dtype == np.int32
        assert (labels[encoded.learnt] == encoded.input_ids[encoded.learnt]).all()
        assert (labels[~encoded.learnt] == IGNORE_INDEX).all()


def test_ids_are_those_of_the_whole_text():
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Paris."}]
    template = ChatTemplate(tokenizer)
    whole = tokenizer(template.render(chat), add_special_tokens=False)["input_ids"]
    assert template.encode(chat).input_ids.tolist() == whole


def test_a_token_never_straddles_a_border_and_the_prompt_is_as_in_generation():
    # The prompt ends with a space, which the tokenizer would join to the answer: ' you'.
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "Who"}, {"role": "assistant", "content": "you are"}]
    whole = tokenizer("user: Who<|im_end|>assistant: you are<|im_end|>")
    you = whole.char_to_token(len("user: Who<|im_end|>assistant: "))
    assert whole.token_to_chars(you).start == len("user: Who<|im_end|>assistant:")  # straddles

    template = ChatTemplate(tokenizer)
    encoded = template.encode(chat)
    assert runs(tokenizer, encoded) == [
        ("user: Who<|im_end|>assistant: ", False),
        ("you are<|im_end|>", True),
    ]
    first = int(encoded.learnt.argmax())
    assert encoded.input_ids[:first].tolist() == template.prompt_ids(chat[:1])


def test_the_first_token_is_never_learnt():
    encoded = ChatTemplate(tiny_tokenizer()).encode(
        [{"role": "user", "content": "Hi"}], None, "all"
    )
    assert not encoded.learnt[0]
    assert encoded.learnt[1:].all()


def test_weights_only_where_a_message_has_one():
    template = ChatTemplate(tiny_tokenizer())
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert template.encode(chat).weights is None
    encoded = template.encode([chat[0], {**chat[1], "loss": 0.25}])
    assert encoded.weights.dtype == np.float32
    assert (encoded.weights[encoded.learnt] == 0.25).all()


def test_truncation_left_over_in_the_backend_does_not_cut():
    tokenizer = tiny_tokenizer()
    tokenizer("Who are you? Who are you?", truncation=True, max_length=3, padding="max_length")
    (encoded,) = encode_layouts(tokenizer, [Layout("Who are you?" * 9, (Span(0, 3),), True)])
    assert tokenizer.decode(encoded.input_ids) == "Who are you?" * 9


def test_documents_are_learnt_with_their_end():
    tokenizer = tiny_tokenizer()
    (encoded,) = encode_text(tokenizer, ["Who are you?"])
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.learnt.tolist() == [False] + [True] * (len(encoded) - 1)
    assert encoded.eos_learnt
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="no EOS token"):
        encode_text(tokenizer, ["a"])


class SlowTokenizer:
    """A tokenizer without offsets: one token a character, or a pair 'ab'."""

    is_fast = False
    pairs = ("ab",)

    def __call__(self, text, add_special_tokens=False):
        ids, at = [], 0
        while at < len(text):
            size = 2 if text[at : at + 2] in self.pairs else 1
            ids.append(sum(map(ord, text[at : at + size])) + 1000 * (size - 1))
            at += size
        return {"input_ids": ids}


def test_slow_tokenizers_go_by_pieces_proved_equal_to_the_whole():
    (encoded,) = encode_layouts(SlowTokenizer(), [Layout("xxyyxx", (Span(2, 4),), True)])
    assert encoded.learnt.tolist() == [False, False, True, True, False, False]
    with pytest.raises(TemplateError, match="slow tokenizer"):
        encode_layouts(SlowTokenizer(), [Layout("xab", (Span(2, 3),), True)])
