"""Word by word gives exactly the ids of the tokenizer itself, or declines."""

import json
import random

import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from tests.tiny import tiny_tokenizer
from xtuner_lite.templates import words as words_module
from xtuner_lite.templates.layout import Layout, Span
from xtuner_lite.templates.tokenise import _backend_batch, _finish, _token_bounds, encode_layouts
from xtuner_lite.templates.words import ascii_pattern, word_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitting(*steps):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def by_pattern(pattern):
    return splitting(pre_tokenizers.Split(Regex(pattern), "isolated"))


def digits():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return tokenizer


KINDS = {
    "gpt2": tiny_tokenizer,
    "digits": digits,
    "llama3": lambda: by_pattern(LLAMA3),
    "qwen2": lambda: by_pattern(QWEN2),
    "o200k": lambda: by_pattern(O200K),
}


def random_text(rng):
    pieces = [
        "Who",
        " are",
        "you",
        "'s",
        "'S",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "12",
        "7",
        "...",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_",
        "|>",
        "Hello",
        "WORLD's",
        "caT",
        "\x00",
        "\x1c",
        "\x7f",
        "!",
        "/",
        "é",
        "猫",
    ]
    pieces += [
        "\u3000",
        "\x85",
        "n\u0303",
        " \u0303",
        "ſ",
        "²",
        "٣",
        "\u200b",
        "😀",
    ] * rng.randrange(2)
    return "".join(rng.choices(pieces, k=rng.randrange(30)))


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_have_the_tokenizers_ids(kind):
    tokenizer = KINDS[kind]()
    words = word_tokenizer(tokenizer)
    assert words is not None
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(400)]
    results = words.encode(texts, [()] * len(texts))
    done = 0
    for text, result in zip(texts, results):
        done += not text.isascii()
        assert result[0] == tokenizer.backend_tokenizer.encode(text).ids, repr(text)
    assert done > 100


@pytest.mark.parametrize("kind", KINDS)
def test_learnt_spans_are_those_of_the_offsets(kind):
    tokenizer = KINDS[kind]()
    rng = random.Random(1)
    layouts = []
    for _ in range(300):
        text = random_text(rng) + "x"
        at = sorted(rng.sample(range(len(text) + 1), min(4, len(text) + 1) // 2 * 2))
        spans = tuple(Span(a, b) for a, b in zip(at[::2], at[1::2]) if b > a)
        layouts.append(Layout(text, spans, True))
    proven = 0
    encodings = _backend_batch(tokenizer, [layout.text for layout in layouts])
    for layout, encoding, ours in zip(layouts, encodings, encode_layouts(tokenizer, layouts)):
        bounds = _token_bounds(encoding, layout.spans, len(layout.text))
        if bounds is not None:
            proven += 1
            whole = _finish(encoding.ids, bounds, layout)
            assert ours.input_ids.tolist() == whole.input_ids.tolist()
            assert ours.learnt.tolist() == whole.learnt.tolist()
    assert proven > 50


def test_only_the_words_beyond_ascii_are_looked_up_whole():
    words = word_tokenizer(tiny_tokenizer())
    assert words.split("one two café! so four") == ["one", " two", " café! so", " four"]
    assert words.split("é a b c") == ["é a", " b", " c"]
    assert "".join(words.split("a é. é b 猫")) == "a é. é b 猫"


def test_tokenizers_of_other_kinds_are_declined():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert word_tokenizer(tokenizer) is None
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert word_tokenizer(tokenizer) is not None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert word_tokenizer(tokenizer) is None
    assert word_tokenizer(splitting(pre_tokenizers.Split("x", "isolated"))) is None
    assert word_tokenizer(by_pattern(r"\p{N}{1,3}")) is None  # leaves gaps, which are pieces too
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True)])
    assert word_tokenizer(tokenizer) is None


def test_tokens_added_later_are_seen():
    tokenizer = tiny_tokenizer()
    (before,) = word_tokenizer(tokenizer).encode(["a<tool>b"], [()])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    (after,) = word_tokenizer(tokenizer).encode(["a<tool>b"], [()])
    assert after[0] == tokenizer.backend_tokenizer.encode("a<tool>b").ids != before[0]


def test_the_dict_of_words_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(words_module, "MAX_WORDS", 20)
    tokenizer = tiny_tokenizer()
    words = word_tokenizer(tokenizer)
    for start in range(0, 100, 10):
        texts = [f"w{n} and w{n + 1}" for n in range(start, start + 10)]
        for text, (ids, _) in zip(texts, words.encode(texts, [()] * 10)):
            assert ids == tokenizer.backend_tokenizer.encode(text).ids
    assert len(words._ids) < 50


def test_patterns_that_are_not_understood():
    assert ascii_pattern(r"\p{N}{1,3}|\s+") == r"[0-9]{1,3}|[\t-\r ]+"
    for pattern in (r"\p{Han}+", r"a++", r"\bfoo", r"[\S]"):
        assert ascii_pattern(pattern) is None


def test_the_state_of_a_pre_tokenizer_is_json():
    state = words_module._state(tiny_tokenizer().backend_tokenizer.pre_tokenizer)
    assert json.loads(state)["type"] == "ByteLevel"
