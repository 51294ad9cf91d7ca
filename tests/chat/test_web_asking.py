"""A question in a conversation: what is remembered when it ends, stops, fails or is asked again."""

import copy
import re

import pytest

pytest.importorskip("gradio", reason="the page needs: pip install gradio")

from tests.chat.web_pages import Parrot
from xtuner_lite.chat.web.asking import ask
from xtuner_lite.chat.web.conversation import Conversation
from xtuner_lite.chat.web.words import LANGUAGES, WORDS, language_of
from xtuner_lite.models.sampling import Sampling

BOTH = ("model", "base")


@pytest.fixture(scope="module")
def parrot():
    return Parrot(pause_s=0)


def asked(parrot, conversation, text, **options):
    """Asks and returns the last step."""
    return list(ask(parrot, conversation, text, Sampling(), **options))[-1]


def test_each_side_sees_its_own_turns_only(parrot):
    conversation = Conversation()
    asked(parrot, conversation, "one", sides=BOTH)
    asked(parrot, conversation, "two")
    asked(parrot, conversation, "three", sides=BOTH, system="Be brief.")
    assert [m["content"] for m in conversation.shown("model")] == [
        "one", "1: one", "two", "2: two", "three", "3: three",
    ]  # fmt: skip
    assert [m["content"] for m in conversation.shown("base")] == [
        "one", "base 1: one", "three", "base 2: three",
    ]  # fmt: skip
    last = conversation.turns[-1]
    assert conversation.messages("base", last, system="Be brief.")[:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
    ]


def test_a_retry_takes_the_place_of_the_last_turn(parrot):
    conversation = Conversation()
    asked(parrot, conversation, "one")
    asked(parrot, conversation, "two")
    asked(parrot, conversation, "two", is_retry=True)
    assert [turn.answers["model"] for turn in conversation.turns] == ["1: one", "2: two"]


def test_a_failure_gives_the_question_back_and_changes_nothing(parrot):
    conversation = Conversation()
    asked(parrot, conversation, "one")
    step = asked(parrot, conversation, "fail now")
    assert step.question == "fail now"
    assert step.notice.startswith("No answer: the conversation has 900 tokens")
    assert [turn.question for turn in conversation.turns] == ["one"]
    assert not conversation.is_answering
    conversation.turns[0].question = "fail later"
    step = asked(parrot, conversation, "fail later", is_retry=True, language="zh")
    assert step.notice.startswith("没有得到回答：the conversation")
    assert conversation.turns[0].answers == {"model": "1: one"}


def test_an_error_of_ours_is_logged_and_shows_no_paths(parrot, caplog, monkeypatch):
    def broken(*args, **options):
        yield ""
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(parrot, "stream", broken)
    step = asked(parrot, Conversation(), "one")
    assert step.notice == "No answer: RuntimeError in the server; its console says more."
    assert "/home/somebody/secret" in caplog.text


def test_a_stopped_answer_stays_as_far_as_it_came():
    conversation, parrot = Conversation(), Parrot(pause_s=0.06)
    steps = ask(parrot, conversation, "a b c d e f g h", Sampling(), sides=BOTH)
    next(steps)
    while " b" not in conversation.turns[0].answers["model"]:
        next(steps)
    conversation.should_stop.set()
    assert [step.notice for step in steps][-1] == ""
    (turn,) = conversation.turns
    assert set(turn.answers) == {"model"}
    assert turn.answers["model"].startswith("1: a b")
    assert not turn.answers["model"].endswith("h")


def test_a_page_that_is_closed_ends_the_answer(parrot):
    conversation = Conversation()
    steps = ask(parrot, conversation, "one two", Sampling())
    next(steps)
    assert conversation.is_answering
    steps.close()
    assert not conversation.is_answering
    assert conversation.turns == []


def test_a_copy_of_a_conversation_is_a_new_one(parrot):
    conversation = Conversation()
    asked(parrot, conversation, "one")
    assert copy.deepcopy(conversation).turns == []


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("de,zh;q=0.5,en;q=0.7", "en"),
        ("fr", "en"),
        ("zh;q=x, zh-TW", "zh"),
        (None, "en"),
    ],
)
def test_the_language_of_a_browser(header, language):
    assert language_of(header) == language


def test_both_languages_have_every_word():
    assert set(WORDS) == set(LANGUAGES)
    assert len(WORDS["en"]) >= 30
    assert set(WORDS["en"]) == set(WORDS["zh"])
    for key, text in WORDS["en"].items():
        fields = re.findall(r"\{(\w+)\}", text)
        assert sorted(fields) == sorted(re.findall(r"\{(\w+)\}", WORDS["zh"][key])), key
