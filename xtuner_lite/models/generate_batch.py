"""Replies to many conversations at once: greedy, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from xtuner_lite.models.generation_setup import (
    generating_with,
    greedy_config,
    input_device,
    model_inputs,
    prompt_of,
    room,
)
from xtuner_lite.models.image_inputs import join_images
from xtuner_lite.models.modes import evaluating
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.models.reply_text import ReplyText
from xtuner_lite.models.sampling import Sampling
from xtuner_lite.models.turns import turns_of
from xtuner_lite.structures import Message
from xtuner_lite.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


class _Prompt(NamedTuple):
    place: int
    """Of the conversation in what was given."""
    ids: list[int]
    images: dict[str, Tensor]

    @property
    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """Prompts of one layout can stand in one batch: their images can be put together."""
        # The first two hold numbers of images or of patches; but of [images, crops, 3, H, W], as
        # LLaVA-OneVision has it, all images of a batch need as many crops.
        first = 1 if "image_sizes" in self.images else 2
        return [(name, tuple(value.shape[first:])) for name, value in sorted(self.images.items())]


def generate_replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    repetition_penalty: float = 1.0,
    stop_words: Sequence[str] = (),
) -> list[str]:
    """The model's next turn in each conversation, without special tokens; greedy.

    The same replies as ``generate_reply`` makes one by one, up to the rounding of products of
    another shape. Prompts are padded on the left, masked there, and batched by length; nothing of
    the model is changed afterwards.

    Args:
        model: a causal language model or an image-text model, or a PeftModel around one.
        tokenizer: carries the chat template; for images a vision tokenizer.
        conversations: each ends with a turn that is not the assistant's.
        batch_size: conversations at once.
        max_new_tokens: longest reply, in tokens.
        repetition_penalty: see Sampling.
        stop_words: texts that end a reply.

    Raises:
        ValueError: as generate_reply; ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 conversation is asked at once")
    options = Sampling(
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        stop_words=tuple(stop_words),
    )
    template = ChatTemplate(tokenizer)
    base = unwrap_adapter(model)
    replies = [""] * len(conversations)
    with ExitStack() as stack:
        stack.enter_context(turns_of(base).taken(None))
        stack.enter_context(evaluating(model))
        for batch in _batches(template, conversations, batch_size):
            longest = max(len(prompt.ids) for prompt in batch)
            limit = min(options.max_new_tokens, room(base, longest))
            config = greedy_config(base, template, limit, options.repetition_penalty)
            for prompt, ids in zip(batch, _generate(base, batch, config), strict=True):
                replies[prompt.place] = _text(tokenizer, ids, config, options.stop_words)
    return replies


def _batches(
    template: ChatTemplate, conversations: Sequence[Sequence[Message]], batch_size: int
) -> Iterator[list[_Prompt]]:
    """Prompts of similar length and one layout, few at once: their pixels are large."""
    window = 8 * batch_size
    for start in range(0, len(conversations), window):
        prompts = [
            _Prompt(start + offset, *prompt_of(template, messages))
            for offset, messages in enumerate(conversations[start : start + window])
        ]
        prompts.sort(key=lambda prompt: (repr(prompt.layout), len(prompt.ids)))
        batch: list[_Prompt] = []
        for prompt in prompts:
            if batch and (len(batch) == batch_size or prompt.layout != batch[0].layout):
                yield batch
                batch = []
            batch.append(prompt)
        yield batch


def _generate(
    base: nn.Module, batch: list[_Prompt], config: GenerationConfig
) -> Iterator[list[int]]:
    """New token ids of each prompt, with what stands behind its end."""
    longest = max(len(prompt.ids) for prompt in batch)
    device = input_device(base)
    shape = (len(batch), longest)
    input_ids = torch.full(shape, config.pad_token_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(batch):
        input_ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, longest - len(prompt.ids) :] = 1
    input_ids, mask = input_ids.to(device), mask.to(device)
    images = reduce(
        lambda first, second: join_images(base, first, second),
        [prompt.images for prompt in batch if prompt.images] or [{}],
    )
    with generating_with(base, config):
        # transformers derives position ids from the mask, so that they start behind the padding.
        output = base.generate(
            **model_inputs(base, input_ids, images),
            attention_mask=mask,
            generation_config=config,
        )
    yield from output[:, longest:].tolist()


def _text(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    config: GenerationConfig,
    stop_words: Sequence[str],
) -> str:
    """The reply: up to the end of the turn, and up to the stop word that is complete first."""
    text = ReplyText(tokenizer, stop_words)
    pieces = []
    for token in ids:
        if token in config.eos_token_id or text.is_stopped:
            break
        pieces.append(text.push(token))
    return "".join([*pieces, text.finish()])
