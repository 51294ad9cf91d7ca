"""What one visitor has asked, and what was answered."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xtuner_lite.images.turns import user_turn
from xtuner_lite.structures import Message

#: Who answers: the model as it was loaded, or its base with the adapter switched off.
Side = Literal["model", "base"]


@dataclass
class Turn:
    """One question with its answers.

    Args:
        question: what the visitor wrote.
        pictures: paths of the files that the question is about.
        answers: who answered -> what; a side that was not asked, or failed, is absent.
    """

    question: str
    pictures: tuple[str, ...] = ()
    answers: dict[Side, str] = field(default_factory=dict)


class Conversation:
    """One visitor's turns. Each side sees only what it was asked and answered itself.

    ``is_answering`` is True while an answer is made; setting ``should_stop`` ends it.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.is_answering = False
        self.should_stop = threading.Event()

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        """A new, empty conversation: gradio copies the first value for each visitor."""
        return Conversation()

    @property
    def pictures(self) -> list[str]:
        """Paths of all files that were asked about."""
        return [path for turn in self.turns for path in turn.pictures]

    def messages(self, side: Side, turn: Turn, *, system: str = "") -> list[Message]:
        """What ``side`` is given to answer ``turn``: the system message and its own turns before.

        Args:
            side: who is asked.
            turn: the question; those before it in ``turns`` are its history.
            system: the system message; '' leaves it to the template.
        """
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for earlier in self.turns:
            if earlier is turn:
                break
            if side in earlier.answers:
                messages.append(user_turn(earlier.question, earlier.pictures))
                messages.append({"role": "assistant", "content": earlier.answers[side]})
        return [*messages, user_turn(turn.question, turn.pictures)]

    def shown(self, side: Side) -> list[Message]:
        """What the column of ``side`` shows; three dots for an answer that has not begun."""
        shown: list[Message] = []
        for turn in self.turns:
            if side in turn.answers:
                files = [{"path": path} for path in turn.pictures]
                texts = [turn.question] if turn.question else []
                content = [*files, *texts] if files else turn.question
                shown.append({"role": "user", "content": content})
                shown.append({"role": "assistant", "content": turn.answers[side] or "…"})
        return shown


def without_folders(text: str, pictures: Sequence[str]) -> str:
    """A message with file names in the place of paths."""
    for picture in pictures:
        text = text.replace(picture, Path(picture).name).replace(str(Path(picture).parent), "...")
    return text
