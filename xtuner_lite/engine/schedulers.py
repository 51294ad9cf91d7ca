"""Learning-rate schedules over a whole run, in shares of its length instead of epochs or steps.

MMEngine's schedules work too (``LinearLR`` and ``CosineAnnealingLR`` in a list); they want their
begin and end in epochs or steps, and refuse a warm-up that is shorter than one step.
"""

from __future__ import annotations

import math
from typing import Any

from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler

from xtuner_lite.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    """Learning rate up in a line, then down along half a cosine, over the whole run.

    With W = ceil(warmup * max_iters) steps of warm-up, step i (from 0) uses lr times

        (i + 1) / (W + 1)                                                   for i < W
        min_lr + (1 - min_lr) * (1 + cos(pi * (i - W) / (max_iters - W))) / 2   after that

    so that no step is wasted at a rate of 0 and a run of one step uses the full rate.

    Args:
        optimizer: its groups' ``lr`` are the peak rates.
        max_iters: optimizer steps of the run (set by the Runner).
        warmup: share of the run, 0 up to below 1. 0.03 is the habit of LLM fine-tuning.
        min_lr: where the cosine ends, as a share of the peak rate, 0 to 1.

    Raises:
        ValueError: a share out of its range, or max_iters below 1.
    """

    def __init__(
        self,
        optimizer: Any,
        max_iters: int,
        *,
        warmup: float = 0.03,
        min_lr: float = 0.0,
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(
                f"warmup={warmup} is not a share of the run in [0, 1); for W steps of n give W / n"
            )
        if not 0 <= min_lr <= 1:
            raise ValueError(
                f"min_lr={min_lr} is not a share of the peak learning rate in [0, 1]; for the "
                "rate m "
                "under the peak p give m / p"
            )
        if max_iters < 1:
            raise ValueError(f"max_iters={max_iters}: a run has at least one optimizer step")
        self.max_iters = max_iters
        self.warmup_iters = min(math.ceil(warmup * max_iters), max_iters - 1)
        self.min_lr = min_lr
        super().__init__(optimizer, by_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands; its shape comes from the config of the resumed run."""
        return {"last_step": self.last_step, "_global_step": self._global_step}

    def _get_value(self) -> list[float]:
        """The rate of each group at ``last_step``, from the step alone (no running product)."""
        return [base * self.factor(self.last_step) for base in self.base_values]

    def factor(self, step: int) -> float:
        """Share of the peak rate used by the optimizer step numbered ``step`` (from 0)."""
        if step < self.warmup_iters:
            return (step + 1) / (self.warmup_iters + 1)
        progress = min(1.0, (step - self.warmup_iters) / (self.max_iters - self.warmup_iters))
        return self.min_lr + (1 - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2
