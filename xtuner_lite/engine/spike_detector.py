"""Tells a step whose loss or gradient stands far out from the steps before it. No torch needed."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

#: Standard deviation of the loss of one unit (a token: nats), at least. A token alone has some 2.5;
#: the tokens of a text vary together, so that n of them tell as much as n / 10 would. A step of n
#: units is not believed to be more exact than this / sqrt(n).
UNIT_SPREAD = 8.0
#: A loss rises over the median at least this many times as far as any ordinary step did lately.
LOSS_REACH = 3.0
#: A gradient norm is at least this many times the largest of the ordinary steps lately.
GRAD_REACH = 5.0
#: A gradient norm this many times the median is never put down to the spread.
MAX_GRAD_FACTOR = 400.0
#: The memory for the largest ordinary values fades to a half in this many windows.
MEMORY_WINDOWS = 8
_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution -> its standard deviation


class SpikeDetector:
    """Compares each step with the median, the spread and the extremes of the steps before it.

    A loss l over n units is a spike if its rise over the median m of the last ``window`` losses is
    more than each of

        threshold * sqrt(s^2 + UNIT_SPREAD^2 / n)   s: spread of these losses (1.48 MAD)
        min_rise
        LOSS_REACH * the largest rise of an ordinary step lately (a fading maximum)

    A gradient norm g is a spike if it is more than each of

        min_grad_norm * (1 + threshold * UNIT_SPREAD / sqrt(n))
        f * median * grad_factor
        f * median * exp(0.75 * threshold * s), at most MAX_GRAD_FACTOR      s: spread of log(norm)
        f * GRAD_REACH * the largest norm of an ordinary step lately (a fading maximum)

    where f = max(1, sqrt(n of the median step / n)): a step of fewer units has a larger gradient.

    Medians, because they do not follow the outliers that are looked for. Extremes, because the
    losses of small or mixed batches have long tails: what a run has done before without harm is
    no spike. Only values given to ``accept`` are learnt from.

    Args:
        window: steps that median and spread are taken over.
        warmup: accepted steps before anything is called a spike.
        threshold: spreads above the median.
        min_rise: least rise of the loss, in its own unit (nats per token).
        grad_factor: least ratio of the gradient norm to its median.
        min_grad_norm: no norm below this is a spike.
    """

    def __init__(
        self,
        *,
        window: int = 128,
        warmup: int = 32,
        threshold: float = 8.0,
        min_rise: float = 1.0,
        grad_factor: float = 20.0,
        min_grad_norm: float = 1.0,
    ) -> None:
        self.window, self.warmup, self.threshold = window, warmup, threshold
        self.min_rise, self.grad_factor, self.min_grad_norm = min_rise, grad_factor, min_grad_norm
        self._fade = 0.5 ** (1 / (MEMORY_WINDOWS * window))
        self.reset()

    def reset(self) -> None:
        """Forget everything and warm up anew."""
        self.num_accepted = 0
        self._losses: deque[float] = deque(maxlen=self.window)
        self._log_norms: deque[float] = deque(maxlen=self.window)
        self._units: deque[float] = deque(maxlen=self.window)
        self._loss_reach = 0.0  # fading maximum of loss - median
        self._top_norm = 0.0  # fading maximum of the gradient norm

    @property
    def is_warm(self) -> bool:
        """Whether enough steps were seen to judge the next one."""
        return self.num_accepted >= self.warmup

    def look(self, loss: float, grad_norm: float | None, num_units: float) -> str | None:
        """What is wrong with a step, or None. Learns nothing; a value that is not finite is wrong.

        Args:
            loss: mean loss of the step.
            grad_norm: before clipping; None where it is not known.
            num_units: units (supervised tokens, pairs) of the step, over 0.
        """
        if not math.isfinite(loss):
            return f"loss {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"grad_norm {grad_norm}"
        if not self.is_warm:
            return None
        found = []
        if loss > (limit := self.loss_limit(num_units)):
            found.append(f"loss {loss:.4g}, median {median(self._losses):.4g}, limit {limit:.4g}")
        if grad_norm is not None and grad_norm > (limit := self.grad_limit(num_units)):
            middle = math.exp(median(self._log_norms))
            found.append(f"grad_norm {grad_norm:.4g}, median {middle:.4g}, limit {limit:.4g}")
        return "; ".join(found) or None

    def loss_limit(self, num_units: float) -> float:
        """The largest loss that is ordinary now for a step of ``num_units``."""
        return self._loss_limit(num_units, self._loss_reach)

    def _loss_limit(self, num_units: float, reach: float) -> float:
        middle, spread = _middle_and_spread(self._losses)
        noise = math.hypot(spread, _unit_noise(num_units))
        rise = max(self.threshold * noise, self.min_rise, LOSS_REACH * reach)
        return middle + rise

    def grad_limit(self, num_units: float) -> float:
        """The largest gradient norm that is ordinary now for a step of ``num_units``."""
        if not self._log_norms:
            return math.inf
        middle, spread = _middle_and_spread(self._log_norms)
        noise = min(0.75 * self.threshold * spread, math.log(MAX_GRAD_FACTOR))
        ordinary = max(
            self.grad_factor * math.exp(middle),
            math.exp(noise) * math.exp(middle),
            GRAD_REACH * self._top_norm,
        )
        fewer = max(1.0, median(self._units) / max(num_units, 1.0))
        least = self.min_grad_norm * (1 + self.threshold * _unit_noise(num_units))
        return max(least, ordinary * math.sqrt(fewer))

    def accept(self, loss: float, grad_norm: float | None, num_units: float) -> None:
        """Learn from an ordinary step."""
        self.num_accepted += 1
        self._losses.append(loss)
        self._units.append(num_units)
        if grad_norm:  # a norm of 0 has no logarithm and tells nothing about the usual size
            self._log_norms.append(math.log(grad_norm))
        if self.num_accepted > self.warmup:
            self._loss_reach = max(self._fade * self._loss_reach, loss - median(self._losses))
            self._top_norm = max(self._fade * self._top_norm, grad_norm or 0.0)
        elif self.is_warm:
            self._learn_extremes()

    def _learn_extremes(self) -> None:
        """The extremes of the warm-up, without what would be a spike by median and spread alone."""
        losses, units = list(self._losses), list(self._units)
        for number, (loss, num_units) in enumerate(zip(losses, units, strict=True), start=1):
            if loss <= self._loss_limit(num_units, reach=0.0):
                self._loss_reach = max(self._loss_reach, loss - median(losses[:number]))
        if self._log_norms:
            limit = self.grad_limit(median(units))
            norms = [math.exp(value) for value in self._log_norms]
            self._top_norm = max((norm for norm in norms if norm <= limit), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything learnt, in plain values."""
        return {
            "num_accepted": self.num_accepted,
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "units": list(self._units),
            "loss_reach": self._loss_reach,
            "top_norm": self._top_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over ``state_dict()``; of a longer window, its newest part."""
        self.num_accepted = state["num_accepted"]
        self._losses = deque(state["losses"], maxlen=self.window)
        self._log_norms = deque(state["log_norms"], maxlen=self.window)
        self._units = deque(state["units"], maxlen=self.window)
        self._loss_reach, self._top_norm = state["loss_reach"], state["top_norm"]


def _middle_and_spread(values: deque[float]) -> tuple[float, float]:
    """Median, and the standard deviation as the median absolute deviation tells it."""
    middle = median(values)
    return middle, _TO_SIGMA * median(abs(value - middle) for value in values)


def _unit_noise(num_units: float) -> float:
    """Standard deviation of the mean of ``num_units`` units, see UNIT_SPREAD."""
    return UNIT_SPREAD / math.sqrt(max(num_units, 1.0))
