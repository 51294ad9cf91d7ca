"""ChatTemplate: a tokenizer's own chat template with a loss mask derived from message structure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from xtuner_lite.structures import Message
from xtuner_lite.templates.layout import (
    TRAIN_ON,
    Layout,
    Renderer,
    RowRefused,
    TemplateError,
    TrainOn,
    lay_out,
)
from xtuner_lite.templates.probes import common_suffix, end_of_calls, written_kinds
from xtuner_lite.templates.tokenise import Encoded, encode_layouts, encode_text

Conversation = tuple[Sequence[Message], "list[dict[str, Any]] | None"]


class ChatTemplate:
    """Renders, masks and encodes conversations with the template a tokenizer carries.

    Make it after :func:`xtuner_lite.templates.presets.apply_template`; it reads
    ``tokenizer.chat_template`` once. It can be pickled (worker processes).

    Args:
        tokenizer: any Hugging Face tokenizer with a chat template.

    Raises:
        TemplateError: the tokenizer has no chat template, or it is not valid jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat "
                "template of its own. Name one: template='chatml' in the config's tokenizer, a "
                "dict of parts or a .jinja file. See: xtuner-lite list templates"
            )
        self.tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[PreTrainedTokenizerBase]]:
        return ChatTemplate, (self.tokenizer,)  # compiled jinja does not pickle

    # ------------------------------------------------------------------ text

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The text of a whole conversation, as the model is trained on it.

        Raises:
            RowRefused: the template refuses the conversation.
        """
        return self._renderer.render(messages, tools)

    def render_prompt(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The text to generate from: the messages and the header of an assistant turn."""
        return self._renderer.render(messages, tools, add_generation_prompt=True)

    def prompt_ids(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of :meth:`render_prompt`; no special token beyond the template's is added."""
        text = self.render_prompt(messages, tools)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # ---------------------------------------------------------------- learnt

    def layout(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        train_on: TrainOn = "assistant",
        train_thinking: bool = False,
    ) -> Layout:
        """The render and its learnt characters.

        Args:
            messages, tools: a checked conversation.
            train_on: "assistant" every answer, "last" the last one, "all" everything.
            train_thinking: learn the answers' reasoning_content too.

        Raises:
            TemplateError: the mask cannot be proved, or the template leaves out what the
                conversation holds (a role, tool calls).
            RowRefused: the template refuses the conversation.
            ValueError: unknown ``train_on``.
        """
        if train_on not in TRAIN_ON:
            raise ValueError(
                f"train_on={train_on!r} is unknown; allowed: {', '.join(map(repr, TRAIN_ON))}"
            )
        self._check_nothing_left_out(messages, train_thinking)
        return lay_out(
            self._renderer,
            messages,
            tools,
            train_on=train_on,
            train_thinking=train_thinking,
            end_texts=self.end_texts,
            final_tail=self.final_tail,
        )

    def encode_batch(
        self,
        conversations: Sequence[Conversation],
        train_on: TrainOn = "assistant",
        train_thinking: bool = False,
    ) -> list[Encoded]:
        """Encodes many (messages, tools) pairs with one call of the tokenizer. Raises as layout."""
        layouts = [
            self.layout(messages, tools, train_on, train_thinking)
            for messages, tools in conversations
        ]
        return encode_layouts(self.tokenizer, layouts)

    def encode(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        train_on: TrainOn = "assistant",
        train_thinking: bool = False,
    ) -> Encoded:
        """Encodes one conversation. Raises as :meth:`layout`."""
        return self.encode_batch([(messages, tools)], train_on, train_thinking)[0]

    def encode_layouts(self, layouts: Sequence[Layout]) -> list[Encoded]:
        """Tokenises layouts made by :meth:`layout` with one call of the tokenizer."""
        return encode_layouts(self.tokenizer, layouts)

    def encode_text(self, texts: Sequence[str]) -> list[Encoded]:
        """Encodes plain documents: all learnt, EOS appended and learnt, BOS as the tokenizer does.

        Raises:
            TemplateError: the tokenizer has no EOS token.
        """
        return encode_text(self.tokenizer, texts)

    # --------------------------------------------------- what ends a turn

    @cached_property
    def _probe(self) -> tuple[str, list[int]]:
        """(final_tail, ids of the token that ends a turn), found by rendering probes."""
        user: Message = {"role": "user", "content": "probe"}
        try:
            one = self._renderer.render([user, {"role": "assistant", "content": "Aone"}])
            two = self._renderer.render([user, {"role": "assistant", "content": "Btwo"}])
            prompted = self._renderer.render(
                [user, {"role": "assistant", "content": "Aone"}], add_generation_prompt=True
            )
        except RowRefused as error:
            raise TemplateError(
                f"the chat template cannot render a question and an answer: {error}. "
                "Name another template (xtuner-lite list templates)."
            ) from error
        suffix = common_suffix(one, two) if one != two else ""
        tail = self._final_tail(suffix, one, prompted)
        ends = self._special_ids(suffix.removesuffix(tail))
        if tail and not ends:  # the tail is what ends the last turn, as gpt-oss's <|return|>
            tail, ends = "", self._special_ids(suffix)
        return tail, ends[:1]

    def _special_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        added = self.tokenizer.added_tokens_decoder
        return [i for i in ids if i == self.tokenizer.eos_token_id or _is_special(added, i)]

    def _final_tail(self, suffix: str, one: str, prompted: str) -> str:
        """What stands behind the last turn only when no generation prompt follows.

        Phi-3's template, for one, writes EOS there, so that the render of a beginning would never
        be a beginning of the whole. Compared by tokens: two special tokens may share characters.
        """
        if prompted.startswith(one) or not suffix:
            return ""
        offsets = _token_starts(self.tokenizer, suffix)
        behind = prompted[len(one) - len(suffix) :]
        same = 0
        for start, end in zip(offsets, [*offsets[1:], len(suffix)]):
            if behind[start:end] != suffix[start:end]:
                break
            same = end
        return suffix[same:]

    @property
    def final_tail(self) -> str:
        """What the template appends behind the last turn only ('' for most); not learnt."""
        return self._probe[0]

    @property
    def end_token_ids(self) -> list[int]:
        """The special token the template ends an assistant turn with; [] if it writes none."""
        return self._probe[1]

    @cached_property
    def call_end_token_ids(self) -> list[int]:
        """The special token that ends a turn of tool calls, as GLM-4's <|observation|>; or []."""
        return self._special_ids(end_of_calls(self._renderer))[:1]

    @cached_property
    def end_texts(self) -> tuple[str, ...]:
        """Texts of the tokens that end a turn: the template's own (answers, calls) and EOS."""
        ids = [*self.end_token_ids, *self.call_end_token_ids, self.tokenizer.eos_token_id]
        texts = [self.tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]
        return tuple(dict.fromkeys(texts))

    def stop_token_ids(self, generation_config: Any = None) -> list[int]:
        """Ids at which generation stops: the template's end of turn, EOS, the config's EOS ids.

        Args:
            generation_config: the model's ``GenerationConfig`` (its ``eos_token_id`` is read) or
                None.
        """
        ends = [*self.end_token_ids, *self.call_end_token_ids]
        return _stop_ids(ends, self.tokenizer, generation_config)

    # ------------------------------------------------ what a template leaves out

    @cached_property
    def shows(self) -> dict[str, bool]:
        """Whether the template writes each role's text, 'tool_calls', 'tools' and 'thinking'.

        A template that skips one of them would train on conversations with a hole in them. One
        that raises on a probe counts as True: on a row it will raise too, and say why.
        """
        return written_kinds(self._renderer)

    def _check_nothing_left_out(
        self, messages: Sequence[Message], train_thinking: bool = False
    ) -> None:
        for index, message in enumerate(messages):
            role = message["role"]
            kind = "tool_calls" if message.get("tool_calls") else role
            if train_thinking and message.get("reasoning_content") and not self.shows["thinking"]:
                kind = "thinking"
            if not self.shows[kind]:
                raise TemplateError(
                    f"message {index} ({role}) holds {_KINDS[kind]}, which the chat template does "
                    "not write: the model would be trained on a conversation with a hole in it. "
                    "Name a template that writes it, such as template='chatml', or take such "
                    "messages out with a map function."
                )


_KINDS = {
    "system": "a system prompt",
    "user": "text as a plain string",
    "assistant": "text as a plain string",
    "tool": "a tool's result",
    "tool_calls": "tool calls",
    "thinking": "reasoning_content that is to be learnt (train_thinking)",
}


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> list[int]:
    """As :meth:`ChatTemplate.stop_token_ids`; EOS alone for a tokenizer without a template."""
    if getattr(tokenizer, "chat_template", None):
        return ChatTemplate(tokenizer).stop_token_ids(generation_config)
    return _stop_ids([], tokenizer, generation_config)


def _stop_ids(
    ends: list[int], tokenizer: PreTrainedTokenizerBase, generation_config: Any
) -> list[int]:
    more = getattr(generation_config, "eos_token_id", None)
    more = [more] if isinstance(more, int) else list(more or [])
    ids = [*ends, tokenizer.eos_token_id, *more]
    return list(dict.fromkeys(int(i) for i in ids if i is not None))


def _is_special(added: dict[int, Any], token_id: int) -> bool:
    return token_id in added and bool(added[token_id].special)


def _token_starts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """First character of each token of ``text``, found without offsets: slow tokenizers too."""
    starts, at = [], 0
    for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
        piece = tokenizer.decode([token_id])
        found = text.find(piece, at) if piece else -1
        if found >= 0:
            starts.append(found)
            at = found + len(piece)
    return starts or [0]


__all__ = [
    "ChatTemplate",
    "Conversation",
    "Encoded",
    "RowRefused",
    "TemplateError",
    "stop_token_ids",
]
