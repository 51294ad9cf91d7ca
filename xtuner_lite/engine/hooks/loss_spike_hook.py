"""Finds steps whose loss or gradient jumps, before the update; warns, stops, skips or goes back."""

from __future__ import annotations

import math
from typing import Any, Literal

from mmengine.hooks import Hook

from xtuner_lite.engine.checkpoint import CheckpointError, list_checkpoints
from xtuner_lite.engine.hooks.checkpoint_hook import CheckpointHook
from xtuner_lite.engine.hooks.nonfinite_guard_hook import (
    NonFiniteGuardHook,
    rows_of_step,
    scaler_will_skip,
)
from xtuner_lite.engine.spike_detector import SpikeDetector
from xtuner_lite.registry import HOOKS

#: Where a checkpoint keeps what the detector has learnt: it belongs to the weights, as they do.
ENTRY = "loss_spike_detector"
_POLICIES = ("warn", "stop", "skip", "rollback")


class LossSpikeError(RuntimeError):
    """Loss or gradient norm of a step jumped; the update was not made."""


@HOOKS.register_module()
class LossSpikeHook(Hook):
    """Act on a step whose loss or gradient norm stands far out from the steps before it.

    Looks at the loss over all ranks and the gradient norm before clipping, between backward and
    update (``before_optimizer_step``); what far out means: engine.spike_detector. A step found bad
    is not learnt from.

    Values that are not finite are left to NonFiniteGuardHook where the run has one, except with
    policy ``"rollback"``; that needs ``nan_guard=dict(policy="skip")``, else the guard stops first.

    Args:
        policy: what a bad step leads to.
            ``"warn"``: a line in the log with the rows of the step; the update is made. After
            ``max_skips`` + 1 bad steps in a row the new level is taken as ordinary.
            ``"stop"``: LossSpikeError.
            ``"skip"``: its gradients are dropped, so it costs one step. After ``max_skips`` in a
            row the next one stops the run.
            ``"rollback"``: as ``"skip"``, but after ``max_skips`` in a row the next one puts
            weights and optimizer back to the newest whole checkpoint from before the first of them
            and goes on with the data after them. If that does not last for ``warmup`` steps, the
            next rollback goes to an older checkpoint.
        max_skips: bad steps in a row that are passed over. One bad batch needs 1; several in a row
            mean that the weights are bad.
        max_rollbacks: in the whole run; a further one stops it.
        window: ordinary steps that a step is compared with.
        warmup: ordinary steps before anything is judged.
        threshold: spreads (robust standard deviations) above the median.
        min_rise: least rise of the loss over the median, in its unit (nats per token).
        grad_factor: least ratio of the gradient norm to its median.
        min_grad_norm: no norm below this is bad.

    Raises:
        ValueError: an option out of range; policy ``"rollback"`` without checkpoints on the way,
            or beside those of another run.
        LossSpikeError: while training, see above.
    """

    priority = "HIGH"  # after the guard against values that are not finite

    def __init__(
        self,
        policy: Literal["warn", "stop", "skip", "rollback"] = "warn",
        *,
        max_skips: int = 5,
        max_rollbacks: int = 3,
        window: int = 128,
        warmup: int = 32,
        threshold: float = 8.0,
        min_rise: float = 1.0,
        grad_factor: float = 20.0,
        min_grad_norm: float = 1.0,
    ) -> None:
        if policy not in _POLICIES:
            raise ValueError(f"LossSpikeHook: policy={policy!r}; use one of {', '.join(_POLICIES)}")
        _at_least(0, max_skips=max_skips, min_rise=min_rise, min_grad_norm=min_grad_norm)
        _at_least(1, max_rollbacks=max_rollbacks, threshold=threshold, grad_factor=grad_factor)
        _at_least(8, warmup=warmup)
        _at_least(warmup, window=window)
        self.policy, self.max_skips, self.max_rollbacks = policy, max_skips, max_rollbacks
        self.detector = SpikeDetector(
            window=window,
            warmup=warmup,
            threshold=threshold,
            min_rise=min_rise,
            grad_factor=grad_factor,
            min_grad_norm=min_grad_norm,
        )
        self.num_bad = 0  # in the whole run, as the next
        self.num_rollbacks = 0
        self._num_in_a_row = 0
        self._first_bad = 0  # 0-based step at which the present row of bad steps began
        self._last_target: int | None = None  # steps of the checkpoint last gone back to
        self._num_good = 0  # ordinary steps since then
        self._save_interval = 1  # optimizer steps between the checkpoints to go back to

    def state_dict(self) -> dict[str, Any]:
        """What has happened in the run. What the detector learnt is stored with the weights."""
        return {
            "num_bad": self.num_bad,
            "num_rollbacks": self.num_rollbacks,
            "num_in_a_row": self._num_in_a_row,
            "first_bad": self._first_bad,
            "last_target": self._last_target,
            "num_good": self._num_good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the resumed run stood."""
        self.num_bad, self.num_rollbacks = state["num_bad"], state["num_rollbacks"]
        self._num_in_a_row, self._first_bad = state["num_in_a_row"], state["first_bad"]
        self._last_target, self._num_good = state["last_target"], state["num_good"]

    def before_save_checkpoint(self, runner, checkpoint: dict[str, Any]) -> None:
        """Puts what the detector learnt into the checkpoint."""
        checkpoint[ENTRY] = self.detector.state_dict()

    def after_load_checkpoint(self, runner, checkpoint: dict[str, Any]) -> None:
        """Takes it back, on a resume and on a rollback."""
        if ENTRY in checkpoint:
            self.detector.load_state_dict(checkpoint[ENTRY])

    def before_train(self, runner) -> None:
        """Checks that there will be something to go back to."""
        if self.policy != "rollback":
            return
        saving = [
            hook
            for hook in runner.hooks
            if isinstance(hook, CheckpointHook) and hook.interval and hook.max_keep_ckpts != 1
        ]
        if not saving:
            raise ValueError(
                "LossSpikeHook: policy='rollback' needs checkpoints on the way, at least two of "
                "them (the newest may be of bad weights already): "
                "default_hooks=dict(checkpoint=dict(interval=..., max_keep_ckpts=2))"
            )
        if runner.iter == 0 and runner.ranks.on_main(lambda: list_checkpoints(runner.work_dir)):
            raise ValueError(
                f"LossSpikeHook: policy='rollback', and {runner.work_dir} holds checkpoints of an "
                "earlier run, which this run must not go back to. Continue that run (--resume), "
                "or choose another --work-dir."
            )
        epoch = len(runner.train_dataloader) if saving[0].by_epoch else 1
        self._save_interval = saving[0].interval * epoch

    def before_optimizer_step(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Judges the step (sums over all ranks, so all ranks agree) and acts."""
        loss, grad_norm = outputs["loss"], outputs.get("grad_norm")
        num_units = outputs.get("num_units", 1.0)
        if num_units == 0:
            return  # nothing was learnt from; the loop skips it
        reason = self.detector.look(loss, grad_norm, num_units)
        if reason is None:
            self.detector.accept(loss, grad_norm, num_units)
            self._num_in_a_row = 0
            self._num_good += 1
            return
        if self._is_for_others(runner, loss, grad_norm):
            return
        self.num_bad += 1
        self._num_in_a_row += 1
        if self._num_in_a_row == 1:
            self._first_bad = runner.iter
        what = f"step {runner.iter + 1}: {reason}. Rows of the step: {_rows(runner, data_batch)}"
        self._act(runner, what)

    def _is_for_others(self, runner, loss: float, grad_norm: float | None) -> bool:
        """Whether a value that is not finite is the guard's or the fp16 scaler's matter."""
        if math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm)):
            return False
        if math.isfinite(loss) and scaler_will_skip(runner):
            return True
        guarded = any(isinstance(hook, NonFiniteGuardHook) for hook in runner.hooks)
        return self.policy == "warn" or (guarded and self.policy != "rollback")

    def _act(self, runner, what: str) -> None:
        if self.policy == "warn":
            self._warn(runner, what)
        elif self.policy == "stop":
            raise LossSpikeError(
                f"loss spike at {what}. The update was not made. Look at these rows; lower the "
                "learning rate or clip gradients (optim_wrapper.clip_grad); or resume and pass "
                "over such steps: default_hooks=dict(loss_spike=dict(policy='skip')), also "
                "'rollback', 'warn'."
            )
        elif self._num_in_a_row <= self.max_skips:
            runner.logger.warning(f"loss spike, skipped {what} ({self.num_bad} bad steps so far)")
            runner.train_loop.skip_step()
        elif self.policy == "skip":
            raise LossSpikeError(
                f"loss spike at {what}. The update was not made, as for the {self.max_skips} steps "
                "before it (loss_spike.max_skips): the weights are bad or the data changed. "
                "Resume from an older checkpoint (--resume PATH) with a lower learning rate, or "
                "let the run go back by itself: default_hooks=dict(loss_spike=dict("
                "policy='rollback')). Where the loss may rise so, raise loss_spike.min_rise."
            )
        else:
            self._roll_back(runner, what)

    def _warn(self, runner, what: str) -> None:
        runner.logger.warning(
            f"loss spike at {what}. The update is made; to leave such steps out: "
            "default_hooks=dict(loss_spike=dict(policy='skip'))"
        )
        if self._num_in_a_row > self.max_skips:
            runner.logger.warning(
                f"{self._num_in_a_row} loss spikes in a row: taken as the new level; spikes are "
                f"looked for again after {self.detector.warmup} steps"
            )
            self.detector.reset()
            self._num_in_a_row = 0

    def _roll_back(self, runner, what: str) -> None:
        if self.num_rollbacks >= self.max_rollbacks:
            raise LossSpikeError(
                f"loss spike at {what}. The update was not made. The run has gone back "
                f"{self.num_rollbacks} times already (loss_spike.max_rollbacks): lower the "
                "learning rate or clip gradients (optim_wrapper.clip_grad), and resume from an "
                "older checkpoint (--resume PATH)."
            )
        before = self._first_bad
        if self._last_target is not None and self._num_good < self.detector.warmup:
            before = min(before, self._last_target - 1)  # those weights did not hold
        try:
            target = runner.train_loop.request_rollback(before, multiple_of=self._save_interval)
        except CheckpointError as error:
            raise LossSpikeError(
                f"loss spike at {what}. The update was not made, and the run cannot go back: "
                f"{error}"
            ) from error
        self.num_rollbacks += 1
        self._last_target, self._num_good, self._num_in_a_row = target, 0, 0
        runner.logger.warning(
            f"loss spike at {what}. Weights and optimizer go back to those after step {target} "
            f"(rollback {self.num_rollbacks} of at most {self.max_rollbacks}); the data goes on "
            "after this step"
        )


def _rows(runner, data_batch: Any) -> str:
    """The rows of the step on every rank: the log is written by the main one alone."""
    rows = runner.ranks.gather(rows_of_step(data_batch))
    if len(rows) == 1:
        return rows[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(rows))


def _at_least(least: float, **options: float) -> None:
    for name, value in options.items():
        if not value >= least:
            raise ValueError(f"LossSpikeHook: {name}={value!r}; use a number from {least} on")
