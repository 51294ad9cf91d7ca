"""Measures the speed of training and the peak of memory."""

from __future__ import annotations

import sys
import time

import torch
from mmengine.hooks import Hook

from xtuner_lite.engine.hooks.console import format_bytes, format_duration, format_number
from xtuner_lite.registry import HOOKS


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Add the speed of each step to its ``outputs``, where the logger finds it.

    Acts around every step; validation and saving are not counted. Adds to ``outputs`` and, as
    ``train/<name>``, to the MessageHub:

        step_time_s         seconds of waiting for the data, forward, backward and update
        data_time_s         the part of it spent waiting for the data (train_loop.data_time_s)
        data_share          data_time_s / step_time_s
        tokens_per_s        tokens that are not padding, all ranks
        units_per_s         units the loss counts, all ranks: supervised tokens for SFT, pairs for
                            DPO
        peak_memory_bytes   highest so far: CUDA memory in tensors on this device; without CUDA the
                            resident memory of this process, which includes what loading took

    After training one line sums the run up.
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self._step_started_s = 0.0
        self._totals = {"num_steps": 0, "num_tokens": 0, "num_units": 0.0, "step_time_s": 0.0}

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Starts the clock; the data of the step is there already."""
        self._step_started_s = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Stops the clock and adds the speeds to ``outputs``."""
        step_time_s = time.perf_counter() - self._step_started_s
        speeds = {}
        data_time_s = getattr(runner.train_loop, "data_time_s", None)
        if data_time_s is not None:  # a loop of a plug-in need not measure it
            step_time_s += data_time_s
            speeds = {"data_time_s": data_time_s, "data_share": data_time_s / step_time_s}
        speeds |= {
            "step_time_s": step_time_s,
            "tokens_per_s": outputs["num_tokens"] / step_time_s,
            "units_per_s": outputs["num_units"] / step_time_s,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        for name, value in speeds.items():
            outputs[name] = value
            runner.message_hub.update_scalar(f"train/{name}", value)
        self._totals["num_steps"] += 1
        self._totals["num_tokens"] += outputs["num_tokens"]
        self._totals["num_units"] += outputs["num_units"]
        self._totals["step_time_s"] += step_time_s

    def after_train(self, runner) -> None:
        """Logs totals and averages of this run (not of the part before a resume)."""
        total = self._totals
        if total["num_steps"] == 0:
            return
        unit_name = getattr(runner.model, "unit_name", "units of the loss")
        runner.logger.info(
            f"trained {total['num_steps']} steps, {total['num_tokens']:.0f} tokens, "
            f"{total['num_units']:.0f} {unit_name} in {format_duration(total['step_time_s'])}: "
            f"{format_number(total['num_tokens'] / total['step_time_s'])} tokens/s, "
            f"peak memory {format_bytes(peak_memory_bytes())}"
        )


def peak_memory_bytes() -> int:
    """Highest memory so far in bytes: of CUDA tensors, or the resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
