"""Replies of a chat model, whole or piece by piece, that leave the model as they found it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from xtuner_lite.models.modes import evaluating, preserved_rng
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.structures import Message
from xtuner_lite.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: longest reply, in tokens.
        temperature: 0 takes the likeliest token each time (greedy); higher is more varied.
        top_p: sample from the likeliest tokens that hold this share of the probability; 1 is all.
        top_k: sample from that many likeliest tokens; 0 is all.
        repetition_penalty: above 1 makes tokens already seen less likely.
        seed: of the random stream; None draws from the current one. Without effect when greedy.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, is_right, allowed in ranges:
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {allowed}")


def generate_reply(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    should_stop: threading.Event | None = None,
) -> str:
    """The model's next turn in a conversation, without special tokens.

    Stops where the tokenizer's chat template ends a turn. Train or eval mode, activation
    checkpointing, the generation config and the random streams are afterwards as they were, so a
    sample in the middle of a training run changes nothing in it.

    Args:
        model: a causal language model, or a PeftModel around one.
        tokenizer: carries the chat template.
        messages: the conversation so far; the last turn is not the assistant's.
        max_new_tokens: as in Sampling, and all up to ``seed``.
        temperature: see Sampling.
        top_p: see Sampling.
        top_k: see Sampling.
        repetition_penalty: see Sampling.
        seed: see Sampling.
        streamer: gets token ids as they come.
        should_stop: when set, the reply ends after the current token.

    Raises:
        ValueError: an option out of its range, or the prompt fills the model's context.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    template = ChatTemplate(tokenizer)
    prompt = template.prompt_ids(messages)
    base = unwrap_adapter(model)
    config = _generation_config(base, template, prompt, sampling)
    input_ids = torch.tensor([prompt], device=base.get_input_embeddings().weight.device)
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(evaluating(model))
        stack.enter_context(_generating_with(base, config))
        if seed is not None:
            torch.manual_seed(seed)
        # Not PeftModel.generate, which would put its own generation config back into the model;
        # the adapter's layers are inside the model itself.
        output = base.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList(
                [_StopWhenSet(should_stop)] if should_stop else []
            ),
        )
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def stream_reply(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    **options: Any,
) -> Generator[str, None, None]:
    """Pieces of the reply of ``generate_reply`` as they are generated.

    Closing the iterator (or leaving the loop over it) ends the generation after its current token.

    Args:
        model: see generate_reply.
        tokenizer: see generate_reply.
        messages: see generate_reply.
        options: those of generate_reply.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    should_stop = threading.Event()
    failures: queue.Queue[BaseException] = queue.Queue()

    def work() -> None:
        try:
            generate_reply(
                model, tokenizer, messages, streamer=streamer, should_stop=should_stop, **options
            )
        except BaseException as error:  # raised again in the reader's thread
            failures.put(error)
            streamer.on_finalized_text("", stream_end=True)

    worker = threading.Thread(target=work, name="generate", daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        should_stop.set()
        worker.join()
    if not failures.empty():
        raise failures.get()


def _generation_config(
    base: nn.Module, template: ChatTemplate, prompt: list[int], sampling: Sampling
) -> GenerationConfig:
    tokenizer, own = template.tokenizer, getattr(base, "generation_config", None)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    room = sampling.max_new_tokens if limit is None else limit - len(prompt)
    if room < 1:
        raise ValueError(
            f"the conversation has {len(prompt)} tokens and the model sees {limit} at once; "
            "shorten it or start anew"
        )
    stops = template.stop_token_ids(own)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        settings = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    return GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, room),
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=stops,
        pad_token_id=pad,
        use_cache=True,
        **settings,
    )


@contextmanager
def _generating_with(base: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Puts ``config`` in the model's place for its own, which would fill in what it leaves open."""
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


class _StopWhenSet(StoppingCriteria):
    """Ends a generation from another thread."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
