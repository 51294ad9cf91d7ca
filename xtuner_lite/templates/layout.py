"""Rendering of conversations and the proof of which characters each assistant turn wrote.

The loss mask is derived from message structure, never by searching text. For assistant message i

    start = len(render(messages[:i], add_generation_prompt=True))
    end   = len(render(messages[:i + 1]))

and both renders must be beginnings of the render of the whole conversation. Where a template breaks
this (it rewrites earlier turns, as some thinking templates do), no mask can be proved and
:class:`TemplateError` says at which message the texts part.

A message's ``reasoning_content`` is found in its turn the same way: by rendering the turn again
with a letter put in front of it and behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

# Not public, but it is the environment (sandbox, filters, globals) that apply_chat_template renders
# with; a second environment of ours could drift from it. tests/templates compares the two.
from transformers.utils.chat_template_utils import _compile_jinja_template

from xtuner_lite.structures import Message
from xtuner_lite.templates.content_parts import as_parts, joined_parts, split_header

TrainOn = Literal["assistant", "last", "all"]
TRAIN_ON: tuple[str, ...] = ("assistant", "last", "all")

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class TemplateError(ValueError):
    """The template cannot be used for training as it stands: the run has to stop."""


class RowRefused(ValueError):
    """The template itself refuses this conversation (its ``raise_exception``): one row is bad."""


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a render that are learnt, with the weight of their tokens."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Layout:
    """A rendered conversation and what of it is learnt."""

    text: str
    spans: tuple[Span, ...]
    """In order, not overlapping, never empty."""
    ends_learnt: bool
    """True if every learnt assistant turn ends with a learnt end-of-turn or EOS token."""


def compile_template(source: str) -> jinja2.Template:
    """The compiled jinja template; cached by its text.

    Raises:
        TemplateError: the text is not valid jinja.
    """
    try:
        return _compile_jinja_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is not valid jinja: line {error.lineno}: {error.message}. "
            "Correct the template, or name a preset (xtuner-lite list templates)."
        ) from error


class Renderer:
    """Renders conversations exactly as ``tokenizer.apply_chat_template(..., tokenize=False)`` does.

    It skips that function's per-call copying, which is most of its time on short rows; so the
    messages must be plain data (str, int, list, dict), which data/messages.py makes sure of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._image_token, plain = split_header(tokenizer.get_chat_template())
        self._plain = compile_template(plain)
        with_tools = tokenizer.get_chat_template(tools=[{}])  # a second template in some models
        self._with_tools = compile_template(split_header(with_tools)[1])
        self._globals = {**self._with_tools.globals, **self._plain.globals}
        self._variables = dict(tokenizer.special_tokens_map)
        self._wants_parts = False
        self._wants_parts = self._reads_parts_only()

    def _reads_parts_only(self) -> bool:
        """Whether contents have to be lists of parts: a text would be left out."""
        mark = "qzprobeqz"
        try:
            if mark in self.render([{"role": "user", "content": mark}]):
                return False
        except RowRefused:
            pass
        try:
            return mark in self.render([{"role": "user", "content": as_parts(mark)}])
        except RowRefused:
            return False

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation; contents may be texts or lists of parts.

        Raises:
            RowRefused: the template raised; the reason it gave is in the message.
        """
        template = self._with_tools if tools else self._plain
        try:
            # template.render() would copy all globals, one look-up each, on every call.
            names = {
                **self._globals,
                "messages": [self._normalised(message) for message in messages],
                "tools": tools or None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._variables,
            }
            return "".join(template.root_render_func(template.new_context(names, shared=True)))
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages) or "none"
            raise RowRefused(
                f"the chat template refuses the conversation (roles: {roles}): {error}"
            ) from error

    def _normalised(self, message: Message) -> Mapping[str, Any]:
        """The message as templates expect it: no None values, reasoning under both of its names."""
        if None in message.values():
            message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if self._wants_parts and content is not None:
            message = {**message, "content": as_parts(content)}
        elif self._image_token is not None and isinstance(content, list):
            message = {**message, "content": joined_parts(content, self._image_token)}
        if any(key in message for key in _REASONING_KEYS):
            reasoning = next(message[key] for key in _REASONING_KEYS if key in message)
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
        return message


def lay_out(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    *,
    train_on: TrainOn,
    train_thinking: bool,
    end_texts: tuple[str, ...],
    final_tail: str,
) -> Layout:
    """Renders a conversation and proves its learnt characters.

    Args:
        messages: a checked conversation; a message's ``loss`` overrides ``train_on``.
        tools: JSON schemas of tools, passed to the template.
        train_on: "assistant" every assistant turn, "last" the last one only, "all" every character.
        train_thinking: learn the reasoning_content of answers too ("all" always does).
        end_texts: texts of the tokens that end a turn (see ``ChatTemplate.end_texts``).
        final_tail: what the template appends behind the last turn only ('' for most).

    Raises:
        TemplateError: a prefix does not agree with the whole render.
        RowRefused: the template raised.
    """
    whole = renderer.render(messages, tools)
    weights = message_weights(messages, train_on)
    if train_on == "all" and all(weight == 1.0 for weight in weights):
        body = whole.removesuffix(final_tail) if final_tail else whole
        ended = body.rstrip().endswith(end_texts) if end_texts else False
        return Layout(whole, (Span(0, len(whole)),) if whole else (), ended)
    spans: list[Span] = []
    ends_learnt = True
    for index, weight in enumerate(weights):
        if weight == 0.0:
            continue
        start, end = _turn(renderer, messages, tools, index, whole, final_tail)
        if messages[index]["role"] == "assistant":
            end, ended = _cut_behind_end_token(whole, start, end, end_texts)
            ends_learnt = ends_learnt and ended
        pieces = [(start, end)]
        if not train_thinking and messages[index].get("reasoning_content"):
            thought = thought_of(renderer, messages[: index + 1], tools, whole)
            pieces = [(start, min(thought[0], end)), (max(thought[1], start), end)]
            if not whole[
                slice(*pieces[0])
            ].strip():  # the space is part of the thought's first word
                del pieces[0]
        spans += [Span(*piece, weight) for piece in pieces if piece[1] > piece[0]]
    return Layout(whole, tuple(spans), ends_learnt and bool(spans))


def message_weights(messages: Sequence[Message], train_on: TrainOn) -> list[float]:
    """Weight of each message's tokens: its own ``loss`` if it has one, else 1 or 0 by train_on."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    weights: list[float] = []
    for index, message in enumerate(messages):
        explicit = message.get("loss")
        if explicit is not None:
            weights.append(float(explicit))
        elif train_on == "assistant":
            weights.append(float(message["role"] == "assistant"))
        elif train_on == "last":
            weights.append(float(index == last))
        else:
            weights.append(1.0)
    return weights


def _turn(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    index: int,
    whole: str,
    final_tail: str,
) -> tuple[int, int]:
    """Characters [start, end) that message ``index`` adds to the render, end tokens included."""
    is_answer = messages[index]["role"] == "assistant"
    before = ""
    if index or is_answer:
        before = renderer.render(messages[:index], tools, add_generation_prompt=is_answer)
        if not is_answer:
            before = before.removesuffix(final_tail)
    if not whole.startswith(before):
        if index == 0:
            raise RowRefused(
                "the conversation starts with an assistant message, and the template writes its "
                "beginning differently when a prompt is asked for without any message"
            )
        what = "the messages before it" + (" and the generation prompt" if is_answer else "")
        raise _parting(messages, index, what, before, whole)
    if index == len(messages) - 1:
        return len(before), len(whole.removesuffix(final_tail))
    through = renderer.render(messages[: index + 1], tools).removesuffix(final_tail)
    if not whole.startswith(through):
        raise _parting(messages, index, "the messages up to and including it", through, whole)
    if len(through) < len(before):
        raise _parting(messages, index, "the messages before it", before, through)
    return len(before), len(through)


def thought_of(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    whole: str,
) -> tuple[int, int]:
    """Characters [start, end) of the last message's thinking; (0, 0) if it is not written.

    Two letters in front of it tell where it starts, two behind it where it ends.

    Raises:
        TemplateError: the render around the thinking is not that of the whole.
    """
    *earlier, message = messages
    thought = message["reasoning_content"]
    plain = renderer.render(messages, tools)
    fronts = [renderer.render([*earlier, {**message, "reasoning_content": letter + thought}], tools)
              for letter in "ab"]  # fmt: skip
    if fronts[0] == fronts[1]:
        return 0, 0
    backs = [renderer.render([*earlier, {**message, "reasoning_content": thought + letter}], tools)
             for letter in "ab"]  # fmt: skip
    start = len(_common_beginning(*fronts))
    behind = len(_common_beginning(backs[0][::-1], backs[1][::-1]))
    end = len(plain) - behind
    same = whole.startswith(plain[:end]) and plain[:start] == fronts[0][:start]
    if not same or plain[end:] != backs[0][len(backs[0]) - behind :] or end < start:
        raise TemplateError(
            f"the chat template's mask cannot be proved: at message {len(earlier)} (assistant) the "
            "place of its reasoning_content cannot be told. Set train_thinking=True to learn it "
            "with the answer, or take it out with a map function."
        )
    return start, end


def _common_beginning(one: str, two: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
    return one[:at]


def _cut_behind_end_token(
    whole: str, start: int, end: int, end_texts: tuple[str, ...]
) -> tuple[int, bool]:
    """The end of a turn without the white space behind its end token; whether it has such a token.

    A turn without one keeps its white space: a newline may be all that ends it.
    """
    text = whole[start:end].rstrip()
    if end_texts and text.endswith(end_texts):
        return start + len(text), True
    return end, False


def _parting(
    messages: Sequence[Message], index: int, what: str, part: str, whole: str
) -> TemplateError:
    at = len(_common_beginning(part, whole))
    around = slice(max(at - 40, 0), at + 40)
    if index == len(messages) - 1:
        advice = (
            "The prompt to generate from opens something (such as <think>) that the answer does "
            "not go on with. Give the answers their reasoning_content, or name another template "
            "(xtuner-lite list templates)."
        )
    else:
        advice = (
            "The template rewrites earlier turns once later ones follow. Set train_on='last' "
            "(only the last answer has to agree), or name a template that keeps turns as they "
            "were (xtuner-lite list templates)."
        )
    return TemplateError(
        f"the chat template's mask cannot be proved: at message {index} "
        f"({messages[index]['role']}) of {len(messages)} the render of {what} is not a beginning "
        f"of the whole render. They part at character {at}:\n"
        f"  part:  ...{part[around]!r}\n"
        f"  whole: ...{whole[around]!r}\n" + advice
    )
