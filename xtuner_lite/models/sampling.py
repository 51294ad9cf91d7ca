"""How a reply is to be made, and what is known of it afterwards. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where a reply ends.

    Args:
        max_new_tokens: longest reply, in tokens.
        temperature: 0 takes the likeliest token each time (greedy); higher is more varied.
        top_p: sample from the likeliest tokens that hold this share of the probability; 1 is all.
        top_k: sample from that many likeliest tokens; 0 is all.
        repetition_penalty: above 1 makes tokens already seen less likely.
        seed: of the reply's own random stream; None is another one for each reply. Without effect
            when greedy.
        stop_words: texts that end a reply, which is then what stands before the first of them.

    Raises:
        TypeError: stop_words is a string, not a list of them.
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop_words, str):
            raise TypeError(
                f"stop_words is {self.stop_words!r}; give a list: [{self.stop_words!r}]"
            )
        object.__setattr__(self, "stop_words", tuple(self.stop_words))
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            ("stop_words", all(self.stop_words), "texts of at least one character"),
        )
        for name, is_right, allowed in ranges:
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {allowed}")


@dataclass
class ReplyStats:
    """What is known of a reply beside its text; filled in while it is made."""

    prompt_tokens: int = 0
    """Tokens the model was given. Known before the first piece."""
    completion_tokens: int = 0
    """Tokens it generated, the one that ends the turn and those of a stop word included."""
    finish_reason: FinishReason | None = None
    """'stop': the model ended its turn, or a stop word was met. 'length': max_new_tokens, or the
    model's context, was full. 'cancelled': should_stop was set, or the reader left. None: not
    ended, or it failed."""
