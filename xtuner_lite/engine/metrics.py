"""Metrics of the validation and test loops: fed one batch at a time, reduced over all ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from xtuner_lite.registry import METRICS
from xtuner_lite.structures import Batch, LossOutput


class Metric(ABC):
    """Collects sums over the batches of a validation; a subclass adds ``update`` and ``compute``.

    ``compute`` gets the function that sums a number over the ranks, so that every rank returns the
    same figures. Its keys appear in the log as ``val/<key>``.
    """

    def reset(self) -> None:
        """Forget everything: called before each validation."""
        self.sums: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """Add to the running sum ``name``."""
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    @abstractmethod
    def update(self, batch: Batch, output: LossOutput) -> None:
        """Take in one batch and what the method returned for it."""

    @abstractmethod
    def compute(self, sum_over_ranks: Callable[[float], float]) -> dict[str, float]:
        """The figures over everything taken in since ``reset``."""


@METRICS.register_module()
class MeanLoss(Metric):
    """Loss per counted unit (per target token for SFT), over the whole validation set."""

    def update(self, batch: Batch, output: LossOutput) -> None:
        """See Metric.update."""
        self.add("loss", output.loss_sum.item())
        self.add("units", output.num_units)
        for name, value in output.metrics.items():
            total, count = value if isinstance(value, tuple) else (value, output.num_units)
            self.add(f"metric:{name}", float(total))
            self.add(f"count:{name}", float(count))

    def compute(self, sum_over_ranks: Callable[[float], float]) -> dict[str, float]:
        """{'loss': mean, and one mean per metric the method reports}.

        Raises:
            ValueError: nothing in the validation set is supervised.
        """
        units = sum_over_ranks(self.sums.get("units", 0.0))
        if units == 0:
            raise ValueError("the validation set has no supervised token; look at its data report")
        result = {"loss": sum_over_ranks(self.sums["loss"]) / units}
        for key in sorted(self.sums):
            kind, _, name = key.partition(":")
            if kind == "metric":
                count = sum_over_ranks(self.sums[f"count:{name}"])
                result[name] = sum_over_ranks(self.sums[key]) / count if count else math.nan
        return result


@METRICS.register_module()
class Perplexity(Metric):
    """exp(loss per target token)."""

    def update(self, batch: Batch, output: LossOutput) -> None:
        """See Metric.update."""
        self.add("loss", output.loss_sum.item())
        self.add("units", output.num_units)

    def compute(self, sum_over_ranks: Callable[[float], float]) -> dict[str, float]:
        """{'perplexity': value}; inf where exp overflows."""
        mean = sum_over_ranks(self.sums["loss"]) / max(sum_over_ranks(self.sums["units"]), 1e-9)
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}
