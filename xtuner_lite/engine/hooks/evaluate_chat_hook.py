"""Asks the model the same questions again and again while it trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from mmengine.hooks import Hook

from xtuner_lite.engine.hooks.metrics_log import MetricsLog
from xtuner_lite.engine.visualization import add_text
from xtuner_lite.images.files import ImageError
from xtuner_lite.images.turns import local_image, shown_text, user_turn, with_named_images
from xtuner_lite.images.vision_inputs import images_of, vision_of
from xtuner_lite.models.generate import generate_reply
from xtuner_lite.registry import HOOKS
from xtuner_lite.structures import Message

#: Refused messages (the template's errors) and too long ones: the same on every rank.
_BEFORE_THE_MODEL_RUNS = (ValueError, TypeError, TemplateError)


@HOOKS.register_module()
class EvaluateChatHook(Hook):
    """Generate replies to some questions before, while and after training.

    Acts before the first step, after every ``interval`` optimizer steps and after the last one. The
    replies go to the console and the log, to ``work_dir/<file_name>`` (an object a line: step,
    messages, reply) and as text to the visualizer. Training does not notice: random streams, the
    mode of every module and the gradients are as before. A reply that fails (out of memory, a
    template that refuses the messages) makes a warning and does not end the training; under a
    strategy that shards the model (FSDP2, ZeRO-3) only what fails before the model runs does not,
    for after that the other ranks wait for this one.

    Args:
        questions: user turns as text, for models that see ``dict(image=path, text=...)`` (or a
            list of paths), or conversations as lists of messages that end with a user turn. Paths
            of images begin in the working directory; samples name the files.
        interval: optimizer steps between two rounds. None: none on the way.
        system: system turn before each question that is no conversation. None: what the template
            does.
        max_new_tokens: longest reply, in tokens.
        temperature: 0 takes the likeliest token each time, so that rounds can be compared.
        seed: of the replies' own random stream, when temperature is above 0.
        at_start: a round before the first step. Not after a resume.
        at_end: a round after the last step.
        file_name: the JSON lines file in ``work_dir``.

    Raises:
        ValueError: no questions, one of no known form, an interval below 1; or (before training) no
            tokenizer, an image that cannot be read, or one for a tokenizer of text.
    """

    priority = "LOWEST"  # after the checkpoint: should it kill the process, the step is saved

    def __init__(
        self,
        questions: Sequence[str | dict[str, Any] | list[Message]],
        interval: int | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        at_start: bool = True,
        at_end: bool = True,
        file_name: str = "chat_samples.jsonl",
    ) -> None:
        if isinstance(questions, (str, dict)) or not questions:
            raise ValueError(
                f"EvaluateChatHook: questions={questions!r}; give a list, e.g. ['Who are you?']"
            )
        if interval is not None and interval < 1:
            raise ValueError(f"EvaluateChatHook: interval={interval!r}; use 1 or more, or None")
        self.conversations = [_as_messages(question, system) for question in questions]
        self.interval, self.at_start, self.at_end = interval, at_start, at_end
        self.options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        self.file_name = file_name
        self._log: MetricsLog | None = None
        self._steps_done = 0
        self._last_round: int | None = None

    def before_train(self, runner) -> None:
        """Opens the file; asks the untrained model."""
        if runner.tokenizer is None:
            raise ValueError("EvaluateChatHook needs a tokenizer; add tokenizer=... to the config")
        self._check_images(runner)
        self._steps_done = runner.iter
        if runner.rank == 0:
            self._log = MetricsLog(Path(runner.work_dir) / self.file_name, runner.iter)
        if self.at_start and runner.iter == 0:
            self._ask_all(runner)

    def _check_images(self, runner) -> None:
        """A wrong path is to be told now, not by a warning after hours."""
        for image in images_of([m for messages in self.conversations for m in messages]):
            if vision_of(runner.tokenizer) is None:
                raise ValueError(
                    "EvaluateChatHook: a question has an image, and the tokenizer reads text only; "
                    "use tokenizer=dict(type=load_processor, ...) or load_llava_processor, or "
                    "leave the image out"
                )
            if isinstance(image, str) and not image.lower().startswith("data:"):
                try:
                    local_image(image)
                except ImageError as error:
                    raise ValueError(f"EvaluateChatHook: {error}") from error

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Asks at every ``interval``-th optimizer step."""
        self._steps_done = runner.iter + 1
        if self.interval is not None and self._steps_done % self.interval == 0:
            self._ask_all(runner)

    def after_train(self, runner) -> None:
        """Asks the trained model, unless the last step's round did."""
        if self.at_end and self._last_round != self._steps_done:
            self._ask_all(runner)
        if self._log is not None:
            self._log.close()

    def _ask_all(self, runner) -> None:
        """One round. One rank asks and writes; where each holds parts of the model, all ask."""
        self._last_round = self._steps_done
        if not (runner.strategy.is_sharded or runner.rank == 0):
            return
        begin, texts = time.perf_counter(), []
        for number, messages in enumerate(self.conversations, start=1):
            runner.mark(f"chat sample {number}", self._steps_done)
            try:
                with runner.strategy.generation_context():
                    reply = generate_reply(
                        runner.model.llm, runner.tokenizer, messages, **self.options
                    )
            except Exception as error:  # a sample is never worth a training
                if runner.strategy.is_sharded and not isinstance(error, _BEFORE_THE_MODEL_RUNS):
                    raise  # the other ranks wait in the middle of the model for this one
                runner.logger.warning(
                    f"no chat sample after step {self._steps_done} for "
                    f"{shown_text(messages[-1]['content'])!r}: {type(error).__name__}: {error}"
                )
                continue
            texts.append(f"  > {shown_text(messages[-1]['content'])}\n  {reply.strip()}")
            self._write(runner, messages, reply)
        if texts and runner.rank == 0:
            text = "\n".join(texts)
            seconds = time.perf_counter() - begin
            runner.logger.info(f"chat after step {self._steps_done} ({seconds:.1f} s)\n{text}")
            add_text(runner.visualizer, "chat", text, self._steps_done)

    def _write(self, runner, messages: list[Message], reply: str) -> None:
        if self._log is None:
            return
        try:
            named = with_named_images(messages)
            self._log.write({"step": self._steps_done, "messages": named, "reply": reply})
        except OSError as error:
            runner.logger.warning(f"cannot write {self._log.path}: {error}; the training goes on")


def _as_messages(question: Any, system: str | None) -> list[Message]:
    if isinstance(question, (list, tuple)):
        return [dict(message) for message in question]
    opening = [] if system is None else [{"role": "system", "content": system}]
    if isinstance(question, str):
        return [*opening, user_turn(question)]
    if not isinstance(question, dict) or set(question) != {"image", "text"}:
        raise ValueError(
            f"EvaluateChatHook: a question is {question!r:.80}; allowed: a text, "
            "dict(image=path, text=...), or a list of messages"
        )
    image = question["image"]
    images = image if isinstance(image, (list, tuple)) else [image]
    return [*opening, user_turn(question["text"], images)]
