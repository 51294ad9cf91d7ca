"""Ollama's Modelfile: the chat template in its own language, stop words, system message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtuner_lite.export.publish import ExportError
from xtuner_lite.structures import Message
from xtuner_lite.templates import ChatTemplate, RowRefused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = {"system": "Qsys0Q", "user": "Quse0Q", "assistant": "Qass0Q"}


@dataclass(frozen=True)
class TurnTexts:
    """What a template writes around the turns of a conversation."""

    begin: str
    """Before the first turn."""
    around: dict[str, tuple[str, str]]
    """role -> (before, behind) its text; 'system' is missing where the template refuses one."""
    prompt: str
    """Before the answer that is asked for."""
    default_system: str
    """System message the template puts in when none is given; '' for none."""

    def render(self, messages: list[Message]) -> str:
        """The prompt these texts make, as Ollama would."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        turns = [self.around[m["role"]] for m in messages]
        texts = [b + str(m["content"]) + e for m, (b, e) in zip(messages, turns)]
        return self.begin + "".join(texts) + self.prompt


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf_name: str) -> str:
    """The text of a Modelfile for a GGUF file beside it.

    Raises:
        ExportError: the chat template is not a text around each turn, so that Ollama's language
            cannot say it.
    """
    lines = [f"FROM ./{gguf_name}", ""]
    if getattr(tokenizer, "chat_template", None):
        texts = turn_texts(tokenizer)
        lines += [f'TEMPLATE """{go_template(texts)}"""', ""]
        if texts.default_system:
            lines += [f'SYSTEM """{texts.default_system}"""', ""]
    from xtuner_lite.templates import stop_token_ids

    for index in stop_token_ids(tokenizer):
        lines.append(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(index)}"')
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def go_template(texts: TurnTexts) -> str:
    """The template in the language of Go's text/template."""
    branches = []
    for role, (before, behind) in texts.around.items():
        word = "if" if not branches else "else if"
        branches.append(
            f'{{{{- {word} eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(behind)}'
        )
    body = "".join(branches) + "{{- end }}"
    return f"{_go(texts.begin)}{{{{- range .Messages }}}}{body}{{{{- end }}}}{_go(texts.prompt)}"


def turn_texts(tokenizer: PreTrainedTokenizerBase) -> TurnTexts:
    """The texts of a template, found by rendering marks, and proved on other conversations.

    Raises:
        ExportError: the template does more than put texts around turns.
    """
    template = ChatTemplate(tokenizer)

    def render(*roles: str, prompt: bool = False) -> str:
        messages: list[Message] = [{"role": r, "content": _MARKS[r]} for r in roles]
        return (template.render_prompt if prompt else template.render)(messages)

    user, system, assistant = _MARKS["user"], _MARKS["system"], _MARKS["assistant"]
    try:
        talk = render("user", "assistant", "user", "assistant", "user", prompt=True)
        first, rest = talk.split(user, 1)
        middle, after_middle = rest.split(assistant, 1)
        between = after_middle.split(user, 1)[0]
        tail = talk.rsplit(user, 1)[1]  # behind the last user's text: its end, then the prompt
        behind_user = _common_prefix(middle, tail)
        alone = render("user")
        ended = alone.split(user, 1)[1]
        if tail.startswith(ended):  # the template itself says where the user's turn ends
            behind_user = ended
        prompt, before_assistant = tail[len(behind_user) :], middle[len(behind_user) :]
        behind_assistant, before_user = _cut(between, first)
        begin = first[: len(first) - len(before_user)] if first.endswith(before_user) else ""
        around = {
            "user": (before_user, behind_user),
            "assistant": (before_assistant, behind_assistant),
        }
        default_system = ""
        try:
            with_system = render("system", "user", prompt=True)
            before, behind = with_system.split(system, 1)
            behind = behind.split(user, 1)[0]
            behind = behind.removesuffix(before_user)
            if before.startswith(begin):  # nothing is put in; what begins the text stays outside
                around = {"system": (before[len(begin) :], behind), **around}
            elif begin.startswith(before) and begin.endswith(behind):
                around = {"system": (before, behind), **around}
                default_system = begin[len(before) : len(begin) - len(behind)]
                begin = ""
            else:
                raise ValueError(f"it begins with {begin!r}")
        except RowRefused:
            pass
    except (ValueError, IndexError, RowRefused) as error:
        raise _not_plain(str(error)) from error
    texts = TurnTexts(begin, around, prompt, default_system)
    _prove(template, texts)
    return texts


def _prove(template: ChatTemplate, texts: TurnTexts) -> None:
    talk: list[Message] = [
        {"role": "user", "content": "one {{ x }}"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    tries = [talk[:1], talk]
    if "system" in texts.around:
        tries += [[{"role": "system", "content": "Be brief."}, *t] for t in (talk[:1], talk)]
    for messages in tries:
        if (mine := texts.render(messages)) != (theirs := template.render_prompt(messages)):
            raise _not_plain(f"it renders {theirs!r}, texts around turns give {mine!r}")


def _not_plain(why: str) -> ExportError:
    return ExportError(
        "the chat template is not a text around each turn, so Ollama's language cannot say it "
        f"({why}); leave the Modelfile out (--no-modelfile) and use llama.cpp, which runs the "
        "template itself"
    )


def _cut(between: str, first: str) -> tuple[str, str]:
    """(behind an answer, before a user's text) of what stands between the two."""
    for at in range(len(between) + 1):  # the longest beginning of a user's turn
        if first.endswith(between[at:]):
            return between[:at], between[at:]
    return between, ""


def _common_prefix(a: str, b: str) -> str:
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return a[:length]


def _go(text: str) -> str:
    """A text inside a Go template, trimmed by no neighbour, quoted by nothing around it."""
    if not text:
        return ""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{{{{ "{quoted}" }}}}'
