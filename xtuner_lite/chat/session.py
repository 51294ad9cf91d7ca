"""A conversation with a model: history, and replies that arrive piece by piece."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from xtuner_lite.chat.load import load_for_chat
from xtuner_lite.images.turns import user_turn, with_saved_images
from xtuner_lite.images.vision_inputs import vision_of
from xtuner_lite.models.generate import stream_reply
from xtuner_lite.models.sampling import ReplyStats, Sampling
from xtuner_lite.structures import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatSession:
    """One conversation.

    Args:
        model: a causal language model or an image-text model, or a PeftModel around one.
        tokenizer: carries the chat template; for images a vision tokenizer.
        system: the system message; None leaves it to the template.
        sampling: how tokens are chosen; the default is greedy.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.stats = ReplyStats()
        """Of the newest reply."""
        self._last_turn: Message | None = None
        self.messages: list[Message] = [] if not system else [{"role": "system", "content": system}]

    @property
    def system(self) -> str | None:
        """The system message; None leaves it to the template. Set it at any time."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        turns = self.messages[self.system is not None :]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *turns]

    @property
    def reads_images(self) -> bool:
        """Whether turns may have images."""
        return vision_of(self.tokenizer) is not None

    @property
    def has_asked(self) -> bool:
        """Whether there is a last turn, answered or not, that ``retry`` can ask again."""
        return self._last_turn is not None

    def clear(self) -> None:
        """Forgets the conversation; the system message stays."""
        self.messages = self.messages[: self.system is not None]
        self._last_turn = None

    def send(self, text: str, images: Sequence[Any] = ()) -> Generator[str, None, None]:
        """Pieces of the reply to ``text``.

        The turn enters the history when the reply ends, or as far as it came when the caller stops
        reading; a turn that fails, or is stopped before its first piece, leaves no trace.

        Args:
            text: what is said.
            images: that the text is about: paths or PIL images.

        Raises:
            ValueError: an image cannot be read, or not by this model; or see generate_reply.
        """
        user = self._last_turn = user_turn(text, images)
        yield from self._answer([*self.messages, user])

    def retry(self) -> Generator[str, None, None]:
        """Pieces of another reply to the last turn, in the place of the one it had.

        A turn that failed or was stopped is asked again. The old reply stays if this one fails.

        Raises:
            ValueError: nothing was asked yet.
        """
        if self._last_turn is None:
            raise ValueError("there is nothing to answer again; ask something first")
        turn = [self._last_turn]
        is_answered = self.messages[-2:-1] == turn
        yield from self._answer([*self.messages[: -2 if is_answered else None], *turn])

    def reply(self, text: str, images: Sequence[Any] = ()) -> str:
        """The whole reply to ``text``."""
        return "".join(self.send(text, images))

    def save(self, path: str | Path) -> Path:
        """Writes the conversation as a data file with one row, in the form of OpenAI's messages.

        Images are named by their paths, those below the file's folder from there.

        Raises:
            FileExistsError: there is such a file; it is left as it is.
            ValueError: nothing was said yet.
        """
        if len(self.messages) == (self.system is not None):
            raise ValueError("there is nothing to save yet; ask something first")
        path = Path(path).expanduser()
        row = {"messages": with_saved_images(self.messages, path.absolute().parent)}
        is_lines = path.suffix in (".jsonl", ".ndjson")
        text = json.dumps(
            row if is_lines else [row], ensure_ascii=False, indent=not is_lines or None
        )
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError as error:
            raise FileExistsError(
                f"{path} exists and is left as it is; give another name"
            ) from error
        return path

    def _answer(self, asked: list[Message]) -> Generator[str, None, None]:
        pieces: list[str] = []
        failed = True
        self.stats = ReplyStats()
        stream = stream_reply(
            self.model, self.tokenizer, asked, stats=self.stats, **asdict(self.sampling)
        )
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
            failed = False
        except (GeneratorExit, KeyboardInterrupt):
            stream.close()
            failed = not pieces
            raise
        finally:
            if not failed:
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


__all__ = ["ChatSession", "load_for_chat"]
