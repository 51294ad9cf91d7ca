"""The model behind the server: what it can read, and how much."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from xtuner_lite.chat.server.errors import bad_request
from xtuner_lite.chat.server.images import check_images
from xtuner_lite.chat.server.request import ReplyOrder
from xtuner_lite.chat.server.tool_calls import CallForm, call_form
from xtuner_lite.images.vision_inputs import vision_of
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.templates import ChatTemplate, RowRefused, TemplateError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

#: Context of a model whose config does not tell one.
_UNKNOWN_CONTEXT = 1 << 20


class ServedModel:
    """A model under the name that requests give.

    Args:
        model: a causal language model or an image-text model, or a PeftModel around one.
        tokenizer: carries the chat template; for images a vision tokenizer.
        name: the name it is served under.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.created = int(time.time())
        config = unwrap_adapter(model).config.get_text_config()
        self.context: int = getattr(config, "max_position_embeddings", None) or _UNKNOWN_CONTEXT
        """Tokens of prompt and reply together."""
        self._template = ChatTemplate(tokenizer)
        self._vision = vision_of(tokenizer)
        self.call_form: CallForm | None = call_form(self._template)

    @property
    def reads_images(self) -> bool:
        """Whether user messages may hold images."""
        return self._vision is not None

    def check(self, order: ReplyOrder) -> None:
        """Whether the model can read a request; takes the time of tokenising it, and of decoding
        its images.

        Raises:
            ApiError: (400) the template refuses it or leaves a part of it out, or it is too long.
        """
        self._check_template_writes(order)
        try:
            num_tokens = self._num_tokens(order)
        except (RowRefused, TemplateError) as error:
            raise bad_request(str(error), "messages") from error
        if num_tokens >= self.context:
            raise bad_request(
                f"the messages have {num_tokens} tokens and the model sees {self.context} at once, "
                "its answer included; shorten them",
                "messages",
                "context_length_exceeded",
            )

    def _num_tokens(self, order: ReplyOrder) -> int:
        if self._vision is None:
            return len(self._template.prompt_ids(order.messages, order.tools))
        for index, message in enumerate(order.messages):
            content = message.get("content") or ""
            texts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
            for text in texts:
                self._vision.check_no_image_token(text, f"messages[{index}]")
        sizes = check_images(order.messages)
        text = self._template.render_prompt(order.messages, order.tools)
        text = self._vision.expand(text, sizes)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_template_writes(self, order: ReplyOrder) -> None:
        """Refuses what the template would leave out: the model would never see it."""
        shows = self._template.shows
        for index, message in enumerate(order.messages):
            kind = "tool_calls" if message.get("tool_calls") else message["role"]
            if not shows[kind]:
                raise bad_request(
                    f"messages[{index}] holds {_KINDS[kind]}, which this model's chat template "
                    "does not write; leave it out, or serve the model with --prompt-template NAME",
                    f"messages[{index}]",
                )
        if order.tools and (not shows["tools"] or self.call_form is None):
            raise bad_request(
                "this model's chat template does not write tools, or writes calls in a form that "
                "is not JSON; leave tools out, or serve the model with the template it learnt "
                "tools with: --prompt-template NAME (xtuner-lite list templates)",
                "tools",
                "unsupported_parameter",
            )


_KINDS = {
    "system": "a system prompt",
    "user": "text as a plain string",
    "assistant": "text as a plain string",
    "tool": "a tool's result",
    "tool_calls": "tool calls",
}
