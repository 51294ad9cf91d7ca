"""Answers for many visitors from one model, with its adapter or without."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import nn

from xtuner_lite.chat.web.conversation import Side
from xtuner_lite.images.vision_inputs import vision_of
from xtuner_lite.models.generate import generate_reply
from xtuner_lite.models.sampling import ReplyStats, Sampling
from xtuner_lite.models.turns import GaveUpWaiting, Turns
from xtuner_lite.structures import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Ways to start LoRA that leave the base weights alone. The others (PiSSA, OLoRA, ...) take a part
#: of them away, so that the model without the adapter is not the base model.
_INITS_BESIDE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
#: Seconds after which a reader gets an empty piece, to look whether anybody still wants the answer.
_LOOK_S = 0.2


class Answerer:
    """Makes one answer at a time; those who ask meanwhile wait in order.

    The adapter is switched off and on again inside a turn, so no other answer can see it off.

    Args:
        model: a causal language model or an image-text model, or a PeftModel around one. Nothing
            else may use it.
        tokenizer: carries the chat template; for pictures a vision tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.has_adapter = hasattr(model, "peft_config")
        self.reads_images = vision_of(tokenizer) is not None
        self.no_base_because = _no_base_because(model)
        self._turns = Turns()
        self._asking: dict[threading.Event, threading.Thread] = {}  # by what stops them

    @property
    def has_base(self) -> bool:
        """Whether the base model can be asked beside the fine-tuned one."""
        return self.has_adapter and self.no_base_because is None

    @property
    def num_asking(self) -> int:
        """Answers that are made or waited for."""
        return len(self._asking)

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        side: Side = "model",
        stats: ReplyStats | None = None,
    ) -> Generator[str, None, None]:
        """Pieces of an answer as they come, and '' now and then while none comes.

        Closing the iterator ends the answer after its current token, and a wait at once; the
        adapter is on again before the next answer starts.

        Args:
            messages: the conversation so far; the last turn is the user's.
            sampling: how tokens are chosen.
            side: 'base' switches the adapter off for this answer.
            stats: is filled in.

        Raises:
            ValueError: the model has no base to ask; or see generate_reply.
        """
        if side == "base" and not self.has_base:
            raise ValueError(self.no_base_because or "this model has no adapter to switch off")
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: the end
        should_stop = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                with self._turns.taken(should_stop), self._switched(side):
                    generate_reply(
                        self.model, self.tokenizer, messages, should_stop=should_stop,
                        stats=stats, on_text=pieces.put, **asdict(sampling),
                    )  # fmt: skip
            except GaveUpWaiting:
                pass  # the reader has left
            except BaseException as error:  # raised again in the reader's thread
                failures.append(error)
            finally:
                del self._asking[should_stop]
                pieces.put(None)

        thread = threading.Thread(target=work, name="answer", daemon=True)
        self._asking[should_stop] = thread
        thread.start()
        try:
            while True:
                try:
                    piece = pieces.get(timeout=_LOOK_S)
                except queue.Empty:
                    piece = ""
                if piece is None:
                    break
                yield piece
        finally:
            should_stop.set()
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Ends all answers; returns when the model is at rest, after one step of it at most.

        A process that ends while a thread is inside the model is aborted by the C++ library.
        """
        asking = list(self._asking.items())
        for should_stop, _ in asking:
            should_stop.set()
        for _, thread in asking:
            thread.join()

    def _switched(self, side: Side) -> AbstractContextManager[None]:
        return self.model.disable_adapter() if side == "base" else nullcontext()


def _no_base_because(model: nn.Module) -> str | None:
    """Why the model without its adapter is not the base model; None where it is, or has none."""
    for config in getattr(model, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", True)
        if start not in _INITS_BESIDE_THE_BASE:
            return f"the adapter starts from {start!r}, which takes weights out of the base model"
        bias = getattr(config, "bias", "none")
        if bias != "none":
            return f"the adapter trains biases of the base model (bias={bias!r})"
    return None
