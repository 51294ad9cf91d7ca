"""Tool calls out of a reply, in the form that the chat template writes them.

The form is not looked up by the model's name: the template is asked to write a call whose name and
arguments are known, and what stands around them is the form. So what is read is what was trained.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from xtuner_lite.templates import ChatTemplate, RowRefused

_NAME = "qzprobeqz"
_ARGUMENTS = {"qzkey": "qzvalue"}
_SEPARATORS = " \t\r\n,;"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class CallForm:
    """How a template writes a call.

    Either a JSON object that holds name and arguments (``name_key`` is set), between ``opener`` and
    ``closer``; or the bare name, ``between`` and a JSON object of arguments.
    """

    opener: str
    """In front of the first call, without white space around it; '' where a call is the text."""
    closer: str
    name_key: str | None = None
    arguments_key: str | None = None
    between: str = ""


@dataclass(frozen=True)
class ToolCall:
    """One call of a reply."""

    name: str
    arguments: str
    """JSON text of an object."""

    def as_openai(self) -> dict[str, Any]:
        """The call as OpenAI writes it, with an id of its own.

        Nine letters and digits: some templates (Mistral's) take no other ids back.
        """
        alphabet = string.ascii_letters + string.digits
        call_id = "".join(secrets.choice(alphabet) for _ in range(9))
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": call_id, "type": "function", "function": function}


def call_form(template: ChatTemplate) -> CallForm | None:
    """The form in which a template writes calls; None if it writes none, or not as JSON."""
    call = {"type": "function", "id": "call00001",
            "function": {"name": _NAME, "arguments": _ARGUMENTS}}  # fmt: skip
    schema = {"name": _NAME, "description": "d", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": schema}]
    user: Any = {"role": "user", "content": "probe"}
    try:
        prompt = template.render_prompt([user], tools)
        texts = [
            template.render([user, {"role": "assistant", **answer}], tools)
            for answer in ({"content": "", "tool_calls": [call]}, {"content": "~answer~"})
        ]
    except RowRefused:
        return None
    if not all(text.startswith(prompt) for text in texts):
        return None
    written, plain = (_without_end(template, text[len(prompt) :]) for text in texts)
    head = plain.partition("~answer~")[0]  # an empty thought, say: it is no part of the call
    written = written.removeprefix(head)
    return _object_form(written) or _named_form(written)


def read_calls(
    text: str, form: CallForm, known: Iterable[str]
) -> tuple[str, list[ToolCall]]:  # fmt: skip
    """(text beside the calls, calls) of a whole reply.

    A call that is not complete or not valid JSON leaves the reply as it is, without calls: what the
    model said is never lost.

    Args:
        text: the reply, without special tokens.
        form: how calls are written.
        known: names of the tools; without an opener only these make a text a call.
    """
    known = set(known)
    at = text.find(form.opener)
    if at < 0:
        return text, []
    if form.name_key is None:
        found = _read_named(text[at:].removeprefix(form.opener), form, known)
    else:
        found = _read_objects(text[at:], form)
    if found is None or not (form.opener or all(call.name in known for call in found[0])):
        return text, []
    calls, rest = found
    before = text[:at].rstrip()
    return "\n".join(part for part in (before, rest.strip()) if part), calls


class CallWatch:
    """Passes a streamed reply on, except what may be a call; that is read at the end.

    Args:
        form: how calls are written.
        known: names of the tools.
    """

    def __init__(self, form: CallForm, known: Iterable[str]) -> None:
        self._form = form
        self._known = tuple(known)
        self._held = ""
        self._is_open = True  # whether a call may still begin
        self._in_call = False

    def push(self, piece: str) -> str:
        """The text that is certain not to belong to a call."""
        self._held += piece
        if self._in_call:
            return ""
        end = self._first_doubt() if self._is_open else len(self._held)
        certain, self._held = self._held[:end], self._held[end:]
        return certain

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back, as text and calls."""
        return read_calls(self._held, self._form, self._known) if self._is_open else ("", [])

    def _first_doubt(self) -> int:
        held, opener = self._held, self._form.opener
        if opener:
            at = held.find(opener)
            self._in_call = at >= 0
            if at < 0:
                most = min(len(held), len(opener) - 1)
                at = len(held) - next((n for n in range(most, 0, -1)
                                       if opener.startswith(held[-n:])), 0)  # fmt: skip
            return len(held[:at].rstrip())  # the blanks before a call are part of it
        begun = held.lstrip()
        starts = ("{",) if self._form.name_key else self._known
        if not begun or any(begun.startswith(s) or s.startswith(begun) for s in starts):
            return 0
        self._is_open = False
        return len(held)


def _without_end(template: ChatTemplate, turn: str) -> str:
    """A rendered turn up to its end token, as a reply shows it: without special tokens."""
    ends = [at for end in template.end_texts if end and (at := turn.find(end)) >= 0]
    tokenizer = template.tokenizer
    ids = tokenizer(turn[: min(ends, default=len(turn))], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True)


def _object_form(written: str) -> CallForm | None:
    start = written.find("{")
    while start >= 0:
        value, end = _json_at(written, start)
        if isinstance(value, dict):
            keys = {str(v) if isinstance(v, str) else json.dumps(v): k for k, v in value.items()}
            name, arguments = keys.get(_NAME), keys.get(json.dumps(_ARGUMENTS))
            if name is not None and arguments is not None:
                opener, closer = written[:start].strip(), written[end:].strip()
                return CallForm(opener, closer, name, arguments)
        start = written.find("{", start + 1)
    return None


def _named_form(written: str) -> CallForm | None:
    at = written.find(_NAME)
    start = written.find("{", at + len(_NAME))
    if at < 0 or start < 0:
        return None
    value, end = _json_at(written, start)
    if value != _ARGUMENTS:
        return None
    between = written[at + len(_NAME) : start].strip()
    return CallForm(written[:at].strip(), written[end:].strip(), between=between)


def _read_objects(text: str, form: CallForm) -> tuple[list[ToolCall], str] | None:
    """(calls, text behind them), or None where one cannot be read."""
    calls: list[ToolCall] = []
    at = 0
    while True:
        at = _skip(text, at, form.opener)
        if not text.startswith("{", at):
            break
        value, end = _json_at(text, at)
        if not isinstance(value, dict) or not isinstance(value.get(form.name_key), str):
            return None
        arguments = _arguments(value.get(form.arguments_key, {}))
        if arguments is None:
            return None
        calls.append(ToolCall(value[form.name_key], arguments))
        at = _skip(text, end, form.closer)
    return (calls, text[at:]) if calls else None


def _read_named(text: str, form: CallForm, known: set[str]) -> tuple[list[ToolCall], str] | None:
    start = text.find("{")
    name = text[:start].strip().removesuffix(form.between).strip() if start > 0 else ""
    value, end = _json_at(text, start) if name in known else (None, 0)
    rest = text[_skip(text, end, form.closer) :]
    if not isinstance(value, dict) or rest.strip():
        return None
    return [ToolCall(name, json.dumps(value, ensure_ascii=False))], ""


def _skip(text: str, at: int, word: str) -> int:
    """The place behind separators and, if it stands there, ``word``."""
    while at < len(text) and text[at] in _SEPARATORS:
        at += 1
    if word and text.startswith(word, at):
        return _skip(text, at + len(word), "")
    return at


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """(value, end) of the JSON that starts there; (None, start) if it is none."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def _arguments(value: Any) -> str | None:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) and isinstance(_json_at(value, 0)[0], dict) else None
