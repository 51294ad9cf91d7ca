"""What every way of generating needs first: the prompt, its images, and where a reply ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from xtuner_lite.images.vision_inputs import images_of, vision_of
from xtuner_lite.models.image_inputs import is_image_text, plain_inputs
from xtuner_lite.structures import Message
from xtuner_lite.templates import ChatTemplate


def prompt_of(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
) -> tuple[list[int], dict[str, Tensor]]:
    """Token ids of a prompt, and what the model's forward takes for its images ({} without any).

    Args:
        template: of the tokenizer, which reads images if it is a vision tokenizer.
        messages: the conversation; images are PIL images, or paths from the working directory.
        tools: JSON schemas of tools, for the template.

    Raises:
        ValueError: a part that this tokenizer cannot read.
        ImageError: an image cannot be read.
    """
    vision = vision_of(template.tokenizer)
    if vision is None or not images_of(messages):
        plain = plain_messages(messages)
        for number, message in enumerate(plain if vision is not None else (), start=1):
            vision.check_no_image_token(message.get("content") or "", f"message {number}")
        return template.prompt_ids(plain, tools), {}
    return vision.prompt(messages, tools, template=template)


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages with text in the place of lists of text parts.

    Raises:
        ValueError: a part is something else. A template may print it as it stands, or drop it.
    """
    plain: list[Message] = []
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                    kind = part.get("type", "unknown") if isinstance(part, dict) else part
                    raise ValueError(
                        f"message {number} ({message['role']}) holds a part of type {kind!r}; this "
                        "model reads text only: leave the part out, or describe it in words"
                    )
            message = {**message, "content": "".join(part["text"] for part in content)}
        plain.append(message)
    return plain


def model_inputs(base: nn.Module, input_ids: Tensor, images: dict[str, Tensor]) -> dict[str, Any]:
    """What goes into ``generate`` beside the mask, on the model's device.

    Args:
        base: the transformers model.
        input_ids: int64 [B, T].
        images: of all rows, in order; {} without any.
    """
    if not is_image_text(base):
        return {"input_ids": input_ids}
    moved = {name: value.to(input_ids.device) for name, value in images.items()}
    return plain_inputs(base, input_ids, moved)


def input_device(base: nn.Module) -> torch.device:
    """Where token ids go: to the embedding, or to where accelerate brings an offloaded one."""
    device = base.get_input_embeddings().weight.device
    hook = getattr(base, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook else device


def room(base: nn.Module, num_prompt: int) -> float:
    """Tokens the model can add to a prompt of that length.

    Raises:
        ValueError: there is no room for a single one.
    """
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return math.inf
    if num_prompt >= limit:
        raise ValueError(
            f"the conversation has {num_prompt} tokens and the model sees {limit} at once; "
            "shorten it or start anew"
        )
    return limit - num_prompt


def greedy_config(
    base: nn.Module, template: ChatTemplate, max_new_tokens: int, repetition_penalty: float
) -> GenerationConfig:
    """The likeliest token each time, until the template, tokenizer or model ends the turn."""
    tokenizer = template.tokenizer
    stops = template.stop_token_ids(getattr(base, "generation_config", None))
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=stops,
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        use_cache=True,
        do_sample=False,  # generate.py draws from a stream of its own
    )


@contextmanager
def generating_with(base: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Puts ``config`` in the model's place for its own, which would fill in what it leaves open."""
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own
