"""Keeps a loss or gradient that is NaN or infinite away from the weights."""

from __future__ import annotations

import math
from typing import Any, Literal

from mmengine.hooks import Hook

from xtuner_lite.registry import HOOKS

_MAX_ROWS_SHOWN = 20


class NonFiniteError(RuntimeError):
    """Loss or gradient norm of a step is NaN or infinite; the update was not made."""


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Stop the run, or skip the step, when loss or gradient norm is not finite.

    Acts between backward and update (``before_optimizer_step``), so that the weights never see such
    a gradient.

    Under fp16 an infinite gradient is routine while the loss scale is being found: the scaler skips
    the update and lowers its scale. That is left to the scaler until its scale is down to 1.

    Args:
        policy: ``"stop"`` raises NonFiniteError; ``"skip"`` drops the gradients of this step, warns
            and goes on.
        max_skips: optimizer steps skipped in a row after which ``"skip"`` stops too: weights that
            are broken themselves give no finite loss any more.

    Raises:
        ValueError: an unknown policy, or max_skips below 1.
        NonFiniteError: while training, see above.
    """

    priority = "VERY_HIGH"

    def __init__(self, policy: Literal["stop", "skip"] = "stop", max_skips: int = 10) -> None:
        if policy not in ("stop", "skip"):
            raise ValueError(f"NonFiniteGuardHook: policy={policy!r}; use 'stop' or 'skip'")
        if max_skips < 1:
            raise ValueError(f"NonFiniteGuardHook: max_skips={max_skips!r}; use a number from 1 on")
        self.policy, self.max_skips = policy, max_skips
        self.num_skipped = 0  # in the whole run
        self._num_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Steps skipped so far."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self._num_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting where the resumed run stood."""
        self.num_skipped, self._num_in_a_row = state["num_skipped"], state["num_in_a_row"]

    def before_optimizer_step(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Looks at loss and gradient norm of the step (sums over all ranks, so all ranks agree)."""
        loss, grad_norm = outputs["loss"], outputs.get("grad_norm")
        gradient_is_finite = grad_norm is None or math.isfinite(grad_norm)
        if math.isfinite(loss) and gradient_is_finite:
            self._num_in_a_row = 0
            return
        if math.isfinite(loss) and scaler_will_skip(runner):
            return
        what = (
            f"step {runner.iter + 1}: loss {loss}, grad_norm {grad_norm}; the update was not made. "
            f"Rows of the step{'' if runner.world_size == 1 else f' on rank {runner.rank}'}: "
            f"{rows_of_step(data_batch)}"
        )
        if self.policy == "stop":
            raise NonFiniteError(
                f"{what}. Look at these rows; lower the learning rate or clip gradients "
                "(optim_wrapper.clip_grad); use dtype='bf16' instead of 'fp16'; or go on without "
                "such steps: default_hooks=dict(nan_guard=dict(policy='skip'))."
            )
        self.num_skipped += 1
        self._num_in_a_row += 1
        if self._num_in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{what}. {self.max_skips} steps before it were skipped in a row "
                "(nan_guard.max_skips): the weights or the data are broken. Resume from an older "
                "checkpoint with a lower learning rate."
            )
        runner.logger.warning(f"skipped {what} ({self.num_skipped} skipped so far)")
        runner.train_loop.skip_step()


def rows_of_step(data_batch: Any) -> str:
    """Source rows of the micro-batches of a step as text: 'a.json:3, a.json:9, ...'."""
    rows = [
        row
        for micro_batch in data_batch or []
        for sample_rows in micro_batch.get("row_ids", [])
        for row in sample_rows
    ]
    if not rows:
        return "unknown (the data set gives no row_ids)"
    more = f" and {len(rows) - _MAX_ROWS_SHOWN} more" if len(rows) > _MAX_ROWS_SHOWN else ""
    return ", ".join(rows[:_MAX_ROWS_SHOWN]) + more


def scaler_will_skip(runner) -> bool:
    """Whether an fp16 gradient scaler is at work that still has room to lower its scale."""
    precision = getattr(runner.strategy, "precision", None)
    scaler = getattr(precision, "scaler", None)
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1.0
