"""Metrics of replies to questions: exact match, choices and boxes, each overall and by kind."""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner_lite.data.question_sets import Box, Question
from xtuner_lite.engine.metrics import Metric
from xtuner_lite.registry import METRICS


@dataclass(frozen=True)
class Replies:
    """What the reply loops hand to metrics in the place of a LossOutput."""

    questions: Sequence[Question]
    texts: Sequence[str]


class ReplyMetric(Metric):
    """Scores each reply from 0 to 1; gives the mean over all questions and over each kind.

    A subclass sets ``name`` and adds ``score``. In the log: ``val/<name>``, ``val/<name>/<kind>``.
    """

    name = ""

    @abstractmethod
    def score(self, question: Question, reply: str) -> float:
        """1 for a right reply, 0 for a wrong one, or something between."""

    def update(self, batch: Any, output: Replies) -> None:
        """See Metric.update; ``batch`` is not looked at."""
        for question, reply in zip(output.questions, output.texts, strict=True):
            score = self.score(question, reply)
            for group in ("", *([] if question.kind is None else [f"/{question.kind}"])):
                self.add(f"score:{group}", score)
                self.add(f"count:{group}", 1)

    def compute(self, sum_over_ranks: Callable[[float], float]) -> dict[str, float]:
        """{name: mean, name/kind: mean of that kind, ...}."""
        groups = sorted(key.removeprefix("count:") for key in self.sums if key.startswith("count:"))
        result = {}
        for group in groups:
            count = sum_over_ranks(self.sums[f"count:{group}"])
            score = sum_over_ranks(self.sums[f"score:{group}"])
            result[f"{self.name}{group}"] = score / max(count, 1.0)
        return result


@METRICS.register_module()
class ExactMatch(ReplyMetric):
    """Share of replies equal to one of the right answers.

    Case, blanks, and punctuation and quotes around the text do not count: ' "Yes." ' is 'yes'.
    """

    name = "exact_match"

    def score(self, question: Question, reply: str) -> float:
        """See ReplyMetric."""
        return float(plain(reply) in {plain(answer) for answer in question.answers})


@METRICS.register_module()
class ContainsAnswer(ReplyMetric):
    """Share of replies that hold one of the right answers as whole words."""

    name = "contains_answer"

    def score(self, question: Question, reply: str) -> float:
        """See ReplyMetric."""
        text = f" {' '.join(_words(reply))} "
        wanted = (" ".join(_words(answer)) for answer in question.answers)
        return float(any(f" {words} " in text for words in wanted if words))


@METRICS.register_module()
class ChoiceAccuracy(ReplyMetric):
    """Share of multiple-choice questions answered right, by letter or by the option's own text.

    The reply's letter is its first word if that is one of the options ('B', 'B.', '(B) a cat'),
    else the letter behind 'answer is' or 'option'; without one, the option whose text the reply
    is. Every other reply is wrong.
    """

    name = "accuracy"

    def score(self, question: Question, reply: str) -> float:
        """See ReplyMetric.

        Raises:
            ValueError: the question has no choices.
        """
        if not question.choices:
            raise ValueError(
                f"ChoiceAccuracy: question {question.name} has no choices; use a data set of "
                "multiple choice (MMBenchDataset), or ExactMatch"
            )
        return float(chosen_letter(reply, dict(question.choices)) in question.answers)


@METRICS.register_module()
class BoxAccuracy(ReplyMetric):
    """Share of boxes that overlap the right one enough (RefCOCO's accuracy).

    Args:
        iou: least intersection over union that counts.
        scale: what the numbers of a reply run up to at the right and lower border: 100 as in
            XTuner's data ({<25><30><75><80>}), 1000 as in Qwen-VL's, 1 for shares.

    Raises:
        ValueError: iou is not above 0 and at most 1, or scale not above 0.
    """

    def __init__(self, iou: float = 0.5, scale: float = 100.0) -> None:
        if not 0 < iou <= 1 or scale <= 0:
            raise ValueError(
                f"BoxAccuracy: iou={iou!r}, scale={scale!r}; iou is above 0 and at most 1, scale "
                "above 0"
            )
        self.iou, self.scale = iou, scale
        self.name = f"box_accuracy@{iou:g}"

    def score(self, question: Question, reply: str) -> float:
        """See ReplyMetric.

        Raises:
            ValueError: the question has no box.
        """
        if question.box is None:
            raise ValueError(
                f"BoxAccuracy: question {question.name} has no box; use a data set of places "
                "(RefCOCODataset)"
            )
        found = box_in(reply, self.scale)
        return float(found is not None and box_iou(found, question.box) >= self.iou)


def plain(text: str) -> str:
    """The text in lower case, one blank between words, without punctuation around it."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,:;!?\"'`“”‘’。，！？、*()[]")


#: A word; of Chinese and Japanese, which write no blanks between words, each sign.
_SIGN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SIGN}]|[^\W{_SIGN}]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


_LETTER_FIRST = re.compile(r"\s*[(\[*]*([A-Z])(?:[)\].:,*]|\s*$|\s+(?=\W))")
_LETTER_NAMED = re.compile(r"(?i:answer(?:\s+is)?|option|choice)\s*:?\s*[(\[*]*([A-Z])\b")


def chosen_letter(reply: str, choices: dict[str, str]) -> str | None:
    """The letter of the option that a reply chooses; None if it names none."""
    for pattern in (_LETTER_FIRST.match, _LETTER_NAMED.search):
        found = pattern(reply)
        if found and found[1] in choices:
            return found[1]
    same = [letter for letter, text in choices.items() if plain(text) == plain(reply)]
    return same[0] if len(same) == 1 else None


_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def box_in(reply: str, scale: float) -> Box | None:
    """The box that a reply gives, as shares of the image; None unless it holds four numbers."""
    numbers = [float(number) / scale for number in _NUMBER.findall(reply)]
    if len(numbers) != 4:
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 if one is empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return overlap / (sum(areas) - overlap)
