"""Replies of a chat model, whole or piece by piece, that leave the model as they found it.

Any number of threads may ask the same model: their replies are made one after the other, in the
order of the calls, and none disturbs another's text or random numbers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xtuner_lite.models.generation_setup import (
    generating_with,
    greedy_config,
    input_device,
    model_inputs,
    prompt_of,
    room,
)
from xtuner_lite.models.modes import evaluating
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.models.reply_text import ReplyText
from xtuner_lite.models.sampling import ReplyStats, Sampling
from xtuner_lite.models.turns import GaveUpWaiting, turns_of
from xtuner_lite.structures import Message
from xtuner_lite.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: Temperatures below this are greedy: dividing by them would leave float32.
_GREEDY = 1e-5


def generate_reply(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
    should_stop: threading.Event | None = None,
    stats: ReplyStats | None = None,
    on_text: Callable[[str], None] | None = None,
    **sampling: Any,
) -> str:
    """The model's next turn in a conversation, without special tokens.

    Stops where the tokenizer's chat template ends a turn. Train or eval mode, activation
    checkpointing, the generation config and the random streams are afterwards as they were, so a
    sample in the middle of a training run changes nothing in it.

    Args:
        model: a causal language model or an image-text model, or a PeftModel around one.
        tokenizer: carries the chat template; for images a vision tokenizer.
        messages: the conversation so far; the last turn is not the assistant's.
        tools: JSON schemas of tools, for the template.
        should_stop: when set, the reply ends after the current token, or before its first one
            while another reply is made.
        stats: is filled in.
        on_text: gets the pieces of the reply as they become certain.
        sampling: options of Sampling.

    Raises:
        TypeError: an option Sampling does not know.
        ValueError: an option out of its range, a part of a message that the tokenizer cannot read
            (an image, for one of text; an image file that is damaged), a template that refuses the
            conversation, or a prompt that fills the model's context.
    """
    options = Sampling(**sampling)
    stats = stats if stats is not None else ReplyStats()
    template = ChatTemplate(tokenizer)
    prompt, images = prompt_of(template, messages, tools)
    stats.prompt_tokens = len(prompt)
    base = unwrap_adapter(model)
    max_new_tokens = min(options.max_new_tokens, room(base, len(prompt)))
    listener = _Listener(ReplyText(tokenizer, options.stop_words), should_stop, stats, on_text)
    with ExitStack() as stack:
        try:
            stack.enter_context(turns_of(base).taken(should_stop))
        except GaveUpWaiting:
            stats.finish_reason = "cancelled"
            return ""
        config = greedy_config(base, template, max_new_tokens, options.repetition_penalty)
        listener.stop_ids = frozenset(config.eos_token_id)
        stack.enter_context(evaluating(model))
        stack.enter_context(generating_with(base, config))
        input_ids = torch.tensor([prompt], device=input_device(base))
        # Not PeftModel.generate, which would put its own generation config back into the model;
        # the adapter's layers are inside the model itself.
        base.generate(
            **model_inputs(base, input_ids, images),
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            logits_processor=_processors(options, input_ids.device),
            stopping_criteria=StoppingCriteriaList([listener]),
        )
    return listener.finish()


def stream_reply(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    **options: Any,
) -> Generator[str, None, None]:
    """Pieces of the reply of ``generate_reply`` as they are generated.

    Closing the iterator (or leaving the loop over it) ends the generation after its current token,
    and a wait for the model at once.

    Args:
        model: see generate_reply.
        tokenizer: see generate_reply.
        messages: see generate_reply.
        options: those of generate_reply, except on_text and should_stop.
    """
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: the end
    should_stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            generate_reply(
                model, tokenizer, messages, should_stop=should_stop, on_text=pieces.put, **options
            )
        except BaseException as error:  # raised again in the reader's thread
            failures.append(error)
        finally:
            pieces.put(None)

    worker = threading.Thread(target=work, name="generate", daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            yield piece
    finally:
        should_stop.set()
        worker.join()
    if failures:
        raise failures[0]


def _processors(sampling: Sampling, device: torch.device) -> LogitsProcessorList:
    """What makes the likeliest token of the processed logits the one that ``sampling`` chooses."""
    processors = LogitsProcessorList()
    if sampling.temperature < _GREEDY:
        return processors
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    generator = torch.Generator(device=device)
    generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    processors.append(_Draw(generator))
    return processors


class _Draw(LogitsProcessor):
    """Draws the token from a random stream of the reply's own.

    transformers draws from torch's global stream, which training and other threads use too.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)  # float32 [1, vocabulary]
        token = torch.multinomial(probabilities, 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class _Listener(StoppingCriteria):
    """Hears each token: makes text of it, counts it, and ends the reply where it should end."""

    def __init__(
        self,
        text: ReplyText,
        should_stop: threading.Event | None,
        stats: ReplyStats,
        on_text: Callable[[str], None] | None,
    ) -> None:
        self.stop_ids: frozenset[int] = frozenset()
        self._text, self._should_stop, self._stats, self._on_text = (
            text, should_stop, stats, on_text,
        )  # fmt: skip
        self._pieces: list[str] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        stats = self._stats
        if stats.finish_reason is None:  # some devices run one step too far
            token = int(input_ids[0, -1])
            stats.completion_tokens += 1
            if token in self.stop_ids:
                stats.finish_reason = "stop"
            else:
                self._give(self._text.push(token))
                if self._text.is_stopped:
                    stats.finish_reason = "stop"
                elif self._should_stop is not None and self._should_stop.is_set():
                    stats.finish_reason = "cancelled"
        has_ended = stats.finish_reason is not None
        return torch.full((len(input_ids),), has_ended, device=input_ids.device)

    def finish(self) -> str:
        """Ends the text; returns all of it."""
        self._give(self._text.finish())
        if self._text.is_stopped or self._stats.finish_reason is None:
            self._stats.finish_reason = "stop" if self._text.is_stopped else "length"
        return "".join(self._pieces)

    def _give(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)
