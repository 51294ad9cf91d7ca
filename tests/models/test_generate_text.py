"""Token ids become text: whole characters, and nothing of a stop word, wherever tokens end."""

import pytest

from tests.tiny import tiny_speaker, tiny_tokenizer
from xtuner_lite.models.generate import generate_reply, stream_reply
from xtuner_lite.models.reply_text import ReplyText
from xtuner_lite.models.sampling import ReplyStats, Sampling

TOKENIZER = tiny_tokenizer()
MESSAGES = [{"role": "user", "content": "Who are you?"}]


class Letters:
    """A tokenizer whose tokens are Unicode characters."""

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


class Chunks:
    """A tokenizer whose token i is the i-th of some texts."""

    def __init__(self, *texts):
        self.texts = texts

    def decode(self, ids, skip_special_tokens):
        return "".join(self.texts[i] for i in ids)


def pieces_of(tokenizer, ids, stop_words=()):
    text = ReplyText(tokenizer, stop_words)
    return [piece for piece in [*map(text.push, ids), text.finish()] if piece]


@pytest.mark.parametrize(
    "text", ["Hello there!", "你好，世界", "a🙂b", "é\n\n  x ", "family 👨‍👩‍👧"]
)
def test_pieces_are_whole_characters_and_make_up_the_text(text):
    ids = TOKENIZER(text)["input_ids"]
    pieces = pieces_of(TOKENIZER, ids)
    assert "".join(pieces) == text == TOKENIZER.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_reply_cut_inside_a_character_shows_that():
    ids = TOKENIZER("a你")["input_ids"]  # 'a' and three bytes
    assert pieces_of(TOKENIZER, ids[:-1]) == ["a", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("text", "words", "shown"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("one STO", ["STOP"], "one STO"),  # held back, and given at the end
        ("aab", ["ab"], "a"),  # the second a begins the word, not the first
        ("abc", ["abc", "b"], "a"),  # b is complete first
        ("ababac", ["abac"], "ab"),
        ("你好。再见", ["。"], "你好"),
        ("STOP", ["STOP"], ""),
    ],
)
def test_stop_words(text, words, shown):
    ids = [ord(letter) for letter in text]
    assert "".join(pieces_of(Letters(), ids, words)) == shown


@pytest.mark.parametrize("cut", range(1, 8))
def test_stop_words_do_not_depend_on_token_borders(cut):
    text = "abcabdxyabcy"
    tokenizer = Chunks(*[text[i : i + cut] for i in range(0, len(text), cut)])
    pieces = pieces_of(tokenizer, range(len(tokenizer.texts)), ["dxyz", "xya", "cabdxyab"])
    assert "".join(pieces) == "abcabd"


def test_nothing_of_a_stop_word_is_given_out_early():
    text = ReplyText(Chunks("Hi", " us", "er", ":", " no"), [" user: "])
    assert [text.push(i) for i in range(4)] == ["Hi", "", "", ""]
    assert text.push(4) == ""
    assert text.is_stopped
    assert text.push(0) == text.finish() == ""


def test_a_reply_ends_before_its_stop_word():
    model, stats = tiny_speaker(TOKENIZER, "Hi!"), ReplyStats()
    reply = generate_reply(model, TOKENIZER, MESSAGES, stop_words=["!"], stats=stats)
    assert reply == "Hi"
    assert stats.finish_reason == "stop"
    tokens = len(TOKENIZER("Hi!")["input_ids"])
    assert stats.completion_tokens == tokens  # not one token further
    assert list(stream_reply(model, TOKENIZER, MESSAGES, stop_words=["Hi"])) == []


def test_stop_words_that_cannot_be_meant():
    with pytest.raises(TypeError, match=r"stop_words is 'END'; give a list: \['END'\]"):
        Sampling(stop_words="END")
    with pytest.raises(ValueError, match="it must be texts of at least one character"):
        Sampling(stop_words=["a", ""])
