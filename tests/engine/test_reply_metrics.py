"""Scores of replies, by hand."""

import pytest

from xtuner_lite.data.question_sets import Question
from xtuner_lite.engine.reply_metrics import (
    BoxAccuracy,
    ChoiceAccuracy,
    ContainsAnswer,
    ExactMatch,
    Replies,
    box_in,
    box_iou,
    chosen_letter,
)


def asked(*answers, kind=None, **options):
    return Question("q", ({"role": "user", "content": "?"},), answers, kind, **options)


def figures(metric, *pairs):
    metric.reset()
    metric.update({}, Replies([q for q, _ in pairs], [reply for _, reply in pairs]))
    return metric.compute(lambda value: value)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Yes", 1),
        (' "yes." ', 1),
        ("YES!", 1),
        ("Yes, it is", 0),
        ("", 0),
        ("Y es", 0),
        ("ｙｅｓ", 1),
    ],
)
def test_exact_match(reply, score):
    assert ExactMatch().score(asked("Yes"), reply) == score


def test_any_right_answer_counts():
    assert ExactMatch().score(asked("Yes", "It is"), "it  is") == 1


@pytest.mark.parametrize(
    ("reply", "score"),
    [("The digit is 7.", 1), ("17", 0), ("7", 1), ("seven", 0), ("", 0)],
)
def test_contains_answer(reply, score):
    assert ContainsAnswer().score(asked("7"), reply) == score


@pytest.mark.parametrize(
    ("answer", "reply", "score"),
    [
        ("猫", "这是一只猫。", 1),
        ("两只猫", "这是一只猫。", 0),
        ("7", "数字是7。", 1),
        ("是", "不对", 0),
    ],
)
def test_contains_answer_where_no_blanks_stand_between_words(answer, reply, score):
    assert ContainsAnswer().score(asked(answer), reply) == score


def test_the_mean_over_all_and_over_each_kind():
    pairs = [
        (asked("1", kind="digit"), "1"),
        (asked("2", kind="digit"), "1"),
        (asked("Yes", kind="five"), "Yes"),
        (asked("A"), "A"),
    ]
    assert figures(ExactMatch(), *pairs) == {
        "exact_match": 0.75,  # 3 of 4
        "exact_match/digit": 0.5,
        "exact_match/five": 1.0,
    }


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) a dog", "B"),
        ("B: a dog", "B"),
        ("**B**", "B"),
        ("The answer is B.", "B"),
        ("Option (B)", "B"),
        ("a dog", "B"),
        ("A dog.", "B"),  # the article, not the letter
        ("A", "A"),
        ("D", None),  # not an option
        ("", None),
        ("a horse", None),
        ("Both look alike", None),
    ],
)
def test_the_letter_of_a_reply(reply, letter):
    assert chosen_letter(reply, {"A": "a cat", "B": "a dog"}) == letter


def test_choice_accuracy():
    choices = (("A", "a cat"), ("B", "a dog"))
    question = asked("B", kind="animals", choices=choices)
    pairs = [(question, "B"), (question, "A"), (question, "a dog"), (question, "?")]
    assert figures(ChoiceAccuracy(), *pairs) == {"accuracy": 0.5, "accuracy/animals": 0.5}
    with pytest.raises(ValueError, match="question q has no choices; use .*MMBenchDataset"):
        ChoiceAccuracy().score(asked("B"), "B")


def test_intersection_over_union():
    # two unit squares, half over each other: 0.5 / (1 + 1 - 0.5)
    assert box_iou((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert box_iou((1, 1, 0, 0), (0, 0, 1, 1)) == 0  # turned inside out


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("{<25><50><75><100>}", (0.25, 0.5, 0.75, 1.0)),
        ("[25, 50, 75.0, 100]", (0.25, 0.5, 0.75, 1.0)),
        ("<25><50><75>", None),
        ("there", None),
    ],
)
def test_the_box_of_a_reply(reply, box):
    assert box_in(reply, 100) == box


def test_box_accuracy():
    question = asked("{<0><0><50><100>}", box=(0, 0, 0.5, 1))
    pairs = [
        (question, "{<0><0><50><100>}"),
        (question, "{<0><0><100><100>}"),  # twice as large: exactly half
        (question, "{<0><0><24><100>}"),
        (question, "I cannot say"),
    ]
    assert figures(BoxAccuracy(), *pairs) == {"box_accuracy@0.5": 0.5}
    assert figures(BoxAccuracy(iou=0.9), *pairs) == {"box_accuracy@0.9": 0.25}
    assert BoxAccuracy(scale=1000).score(question, "[0, 0, 500, 1000]") == 1
    with pytest.raises(ValueError, match=r"BoxAccuracy: iou=2.*at most 1"):
        BoxAccuracy(iou=2)
    with pytest.raises(ValueError, match="question q has no box; use .*RefCOCODataset"):
        BoxAccuracy().score(asked("x"), "x")
