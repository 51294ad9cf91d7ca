"""A conversation at a terminal: lines in, replies out, commands that begin with a slash."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner_lite.chat.terminal_output import print_reply, tell_unreadable
from xtuner_lite.images.files import ImageError
from xtuner_lite.images.turns import local_image, shown_image
from xtuner_lite.suggestions import did_you_mean

if TYPE_CHECKING:
    from xtuner_lite.chat.session import ChatSession

COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation; the system message stays",
    "/system TEXT": "set the system message; without TEXT show it; - removes it",
    "/image FILE": "show a picture with the next question; several in a row; - takes them back",
    "/retry": "answer the last message again",
    "/save FILE": "write the conversation as OpenAI messages (.json or .jsonl)",
    "/exit": "leave (Ctrl-D does too); Ctrl-C stops a reply",
}
_NAMES = [command.split()[0] for command in COMMANDS]
_BLOCK = '"""'
_HELP = "\n".join(
    [
        *(f"{command:<14}{text}" for command, text in COMMANDS.items()),
        f"Several lines: paste them, or write {_BLOCK} before and behind them.",
    ]
)


class TerminalChat:
    """One conversation with a person, or with lines from a pipe.

    Args:
        session: the conversation.
        bot_name: shown in front of replies.
        streamed: show replies as they come.
        images: paths of pictures for the first question.
    """

    def __init__(
        self,
        session: ChatSession,
        *,
        bot_name: str = "bot",
        streamed: bool = True,
        images: Sequence[str] = (),
    ) -> None:
        self._session = session
        self._bot_name = bot_name
        self._streamed = streamed
        self._is_dialogue = True
        self._images = list(images)  # for the next question

    def converse(self) -> None:
        """Reads and answers until /exit or the end of input."""
        _edit_lines()
        print("/help lists the commands, /exit leaves, Ctrl-C stops a reply")
        if self._images:
            self._tell_images()
        while True:
            try:
                text = _read_turn("\nyou> ")
                tell_unreadable(text)
            except KeyboardInterrupt:
                print("\n/exit leaves")
                continue
            except EOFError:
                print()
                return
            if text.startswith("/"):
                if self._leaves(text.strip()):
                    return
            elif text.strip():
                self._reply(self._send(text.strip()))

    def answer_lines(self) -> None:
        """Each line of piped input is a turn; only replies go to stdout.

        Raises:
            ValueError: a turn cannot be answered; those behind it may depend on it.
        """
        self._is_dialogue = False
        for line in sys.stdin:
            tell_unreadable(line)
            text = line.strip()
            if text.partition(" ")[0] in _NAMES:
                if self._leaves(text):
                    return
            elif text:
                print_reply(self._send(text), streamed=self._streamed)

    def _send(self, text: str) -> Generator[str, None, None]:
        """Asks, with the pictures that wait for a question."""
        images, self._images = self._images, []
        return self._session.send(text, images) if images else self._session.send(text)

    def _reply(self, pieces: Generator[str, None, None]) -> None:
        """Shows a reply; what goes wrong with one turn does not end a conversation."""
        if not self._is_dialogue:
            print_reply(pieces, streamed=self._streamed)
            return
        from torch import OutOfMemoryError

        try:
            print_reply(pieces, name=self._bot_name, streamed=self._streamed)
        except KeyboardInterrupt:
            print(" [stopped]")
        except (MemoryError, OutOfMemoryError) as error:
            print(
                f"error: the memory is full: {error} (/save keeps the conversation, /clear ends it)"
            )
        except ValueError as error:  # longer than the model's context, a template that refuses
            print(f"error: {error} (/clear starts anew)")
        else:
            self._tell_end()

    def _tell_end(self) -> None:
        stats = self._session.stats
        if stats.finish_reason == "length":
            print(f"[cut after {stats.completion_tokens} tokens; see --max-new-tokens]")
        elif not self._session.messages[-1]["content"].strip():
            print("[an empty reply]")

    def _say(self, text: str) -> None:
        print(text, file=sys.stdout if self._is_dialogue else sys.stderr)

    def _leaves(self, line: str) -> bool:
        """Follows a command; returns whether it ends the conversation."""
        word, _, argument = line.partition(" ")
        if word == "/exit":
            return True
        if word in _NAMES:
            getattr(self, f"_{word[1:]}")(argument.strip())
        else:
            self._say(
                f"unknown command {word!r}{did_you_mean(word, _NAMES) or ';'} /help lists them"
            )
        return False

    def _help(self, argument: str) -> None:
        self._say(_HELP)

    def _clear(self, argument: str) -> None:
        self._session.clear()
        self._images = []
        self._say("forgotten")

    def _system(self, text: str) -> None:
        if text:
            self._session.system = None if text == "-" else text
        self._say(f"system message: {self._session.system or 'the default of the template'}")

    def _image(self, name: str) -> None:
        """Keeps a picture for the next question. In a pipe, what cannot be seen ends the run."""
        if name == "-":
            self._images = []
        elif name and not self._session.reads_images:
            self._refuse("this model reads text only; name an image-text model to show it pictures")
            return
        elif name:
            try:
                self._images.append(local_image(_typed_path(name))[0])
            except ImageError as error:
                self._refuse(str(error))
                return
        self._tell_images()

    def _refuse(self, why: str) -> None:
        if not self._is_dialogue:
            raise ImageError(why)
        self._say(f"error: {why}")

    def _tell_images(self) -> None:
        names = ", ".join(map(shown_image, self._images))
        self._say(f"with the next question: {names or 'no picture; /image FILE adds one'}")

    def _retry(self, argument: str) -> None:
        if not self._session.has_asked:
            self._say("there is nothing to answer again; ask something first")
            return
        sampling = self._session.sampling
        if sampling.temperature == 0 or sampling.seed is not None:
            fixed = "the temperature is 0" if sampling.temperature == 0 else "the seed is fixed"
            self._say(f"({fixed}: the same reply comes again; try --temperature 0.7)")
        self._reply(self._session.retry())

    def _save(self, name: str) -> None:
        if not name:
            self._say("give a file: /save talk.json")
            return
        try:
            self._say(f"saved: {self._session.save(name)}")
        except (OSError, ValueError) as error:
            self._say(f"error: {error}")


def _typed_path(text: str) -> str:
    """A path as it was typed, or as terminals write one that is dropped on them."""
    if Path(text).expanduser().exists():
        return text
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text.replace("\\ ", " ")


def _edit_lines() -> None:
    """Arrow keys, history, and pastes of several lines as one turn, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def _read_turn(prompt: str) -> str:
    text = input(prompt)
    if not text.lstrip().startswith(_BLOCK):
        return text
    lines = [text.lstrip().removeprefix(_BLOCK)]
    while not lines[-1].rstrip().endswith(_BLOCK):
        lines.append(input("...> "))
    lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
    return " " + "\n".join(lines).strip("\n")  # a block is never a command
