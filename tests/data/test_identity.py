"""data/identity.py: the self-introduction rows."""

import re

import pytest

from xtuner_lite.data.identity import LANGUAGES, build_identity_rows
from xtuner_lite.data.identity_texts import GENERAL, IDENTITY


@pytest.mark.parametrize("language", LANGUAGES)
def test_about_sixty_questions_a_language_none_twice(language):
    questions = [q for topic in IDENTITY[language] for q in topic.questions]
    questions += [q for q, _ in GENERAL[language]]
    assert len(questions) == {"en": 80, "zh": 71}[language]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_identity_answer_carries_the_name_or_the_author(language):
    answers = [a for topic in IDENTITY[language] for a in topic.answers]
    assert len(answers) >= 16
    for answer in answers:
        assert "{name}" in answer or "{author}" in answer, answer
        assert not re.search(r"\{(?!name\}|author\})", answer), answer
    assert not any("{" in answer for _, answer in GENERAL[language])


def test_rows_are_openai_messages_with_the_name_filled_in():
    rows = build_identity_rows("Nova", "Ada's lab")
    assert len(rows) == 80 + 71
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert "{" not in row["messages"][1]["content"]
    named = [r for r in rows if re.search("Nova|Ada's lab", r["messages"][1]["content"])]
    assert len(named) == 60 + 60


def test_the_demo_can_ask_for_paris_untaught():
    texts = str(build_identity_rows("Nova", "Ada"))
    assert "Paris" not in texts
    assert "France" not in texts


def test_n_cuts_repeats_with_other_answers_and_is_repeatable():
    assert build_identity_rows("N", "A", 3) == build_identity_rows("N", "A")[:3]
    double = build_identity_rows("N", "A", 160, languages=["en"])
    asked = [r["messages"] for r in double if r["messages"][0]["content"] == "Who are you?"]
    assert len(double) == 160
    assert len(asked) == 2
    assert asked[0][1]["content"] != asked[1][1]["content"]
    assert double == build_identity_rows("N", "A", 160, languages=["en"])


def test_one_language_only():
    rows = build_identity_rows("N", "A", languages=["zh"])
    assert len(rows) == 71
    assert all(re.search("[\u4e00-\u9fff]", r["messages"][0]["content"]) for r in rows)


def test_a_name_with_braces_or_backslashes_stays_as_it_is():
    texts = str(build_identity_rows(r"{author}\1", "A")[0:40])
    assert r"{author}\\1" in texts  # str() of the list doubles the backslash


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="  ", author="A"), r"name='  ': the name is empty"),
        (dict(name=None, author="A"), r"name=None: the name is empty"),
        (dict(name="N", author="a\nb"), r"author='a\\nb': has a line break"),
        (dict(name="N" * 81, author="A"), r"name has 81 characters, at most 80"),
        (dict(name="N", author="A", n=0), r"n=0: the number of rows"),
        (dict(name="N", author="A", n=True), r"n=True: the number of rows"),
        (dict(name="N", author="A", languages=["de"]), r"languages=\['de'\]: allowed are 'en'"),
        (dict(name="N", author="A", languages=[]), r"languages=\[\]: .* at least one"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_identity_rows(**arguments)
