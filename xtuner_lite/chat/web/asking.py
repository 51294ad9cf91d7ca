"""One question from its arrival to its last piece: the steps a page shows."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from xtuner_lite.chat.web.answerer import Answerer
from xtuner_lite.chat.web.conversation import Conversation, Side, Turn, without_folders
from xtuner_lite.chat.web.words import WORDS
from xtuner_lite.models.sampling import ReplyStats, Sampling

logger = logging.getLogger(__name__)

#: Seconds between two updates of a page: more often, a browser would only be kept busy.
_UPDATE_S = 0.05
#: Seconds after which a page gets an update though nothing is new, which tells whether it is open.
_BEAT_S = 1.0


@dataclass
class Progress:
    """Where an answer stands.

    Args:
        notice: a sentence for the visitor; '' for none.
        question: text to put back into the input, so that it can be changed, with the pictures;
            None leaves it.
    """

    notice: str = ""
    question: str | None = None


def ask(
    answerer: Answerer,
    conversation: Conversation,
    question: str,
    sampling: Sampling,
    *,
    pictures: Sequence[str] = (),
    sides: tuple[Side, ...] = ("model",),
    system: str = "",
    language: str = "en",
    is_retry: bool = False,
) -> Generator[Progress, None, None]:
    """Asks each side in turn and keeps the conversation up to date after every few pieces.

    A stopped answer stays as far as it came. A question that gets no answer at all leaves the
    conversation as it was; its text comes back in the last Progress.

    Args:
        answerer: makes the answers.
        conversation: gets the turn; ``is_answering`` while this runs.
        question: what is asked.
        sampling: how tokens are chosen.
        pictures: paths of the files that it is about.
        sides: who is asked, in this order.
        system: the system message; '' leaves it to the template.
        language: of the notices, a key of WORDS.
        is_retry: the turn takes the place of the last one, which comes back if it fails.
    """
    before = list(conversation.turns)
    turn = Turn(question, tuple(pictures))
    conversation.is_answering = True
    conversation.should_stop.clear()
    notice = ""
    try:
        conversation.turns = [*(before[:-1] if is_retry else before), turn]
        for side in sides:
            notice = yield from _answer_of(
                side, answerer, conversation, turn, sampling, system=system, words=WORDS[language]
            )
            if notice or conversation.should_stop.is_set():
                break
    except ValueError as error:  # the conversation's fault; told in the page, which lives on
        told = without_folders(str(error), [*conversation.pictures, *pictures])
        notice = WORDS[language]["failed"].format(error=told)
    except Exception as error:  # ours: the console gets the traceback, visitors no paths of files
        logger.exception("an answer failed")
        notice = WORDS[language]["broken"].format(error=type(error).__name__)
    finally:
        turn.answers = {side: text for side, text in turn.answers.items() if text}
        if not turn.answers:
            conversation.turns = before
        conversation.is_answering = False
    yield Progress(notice, None if turn.answers or is_retry else question)


def _answer_of(
    side: Side,
    answerer: Answerer,
    conversation: Conversation,
    turn: Turn,
    sampling: Sampling,
    *,
    system: str,
    words: dict[str, str],
) -> Generator[Progress, None, str]:
    """Fills ``turn.answers[side]``; returns what there is to say about the finished answer."""
    messages = conversation.messages(side, turn, system=system)
    stats = ReplyStats()
    num_before = answerer.num_asking
    waiting = Progress(words["waiting"].format(count=num_before) if num_before else "")
    turn.answers[side] = ""
    shown_at = time.monotonic()
    yield waiting
    with closing(answerer.stream(messages, sampling, side=side, stats=stats)) as pieces:
        for piece in pieces:
            turn.answers[side] += piece
            if conversation.should_stop.is_set():
                return ""
            is_due = time.monotonic() - shown_at >= (_UPDATE_S if piece else _BEAT_S)
            if is_due:
                shown_at = time.monotonic()
                yield Progress() if turn.answers[side] else waiting
    return words["cut"] if stats.finish_reason == "length" else ""
