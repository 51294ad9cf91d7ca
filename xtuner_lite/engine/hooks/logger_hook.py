"""Logs a run: lines for people, a bar on a terminal, ``metrics.jsonl`` and the visualizer."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from xtuner_lite.engine.hooks.console import (
    SHOWN_IN_BAR,
    ProgressBar,
    format_number,
    train_line,
)
from xtuner_lite.engine.hooks.metrics_log import METRICS_FILE, MetricsLog
from xtuner_lite.registry import HOOKS

_SUMMED = ("num_tokens", "num_units", "step_time_s", "data_time_s")
_UNITS = "units/"  # of a source of a mixture: the supervised tokens of its loss/<source>
#: Values a line derives from the sums, or that are the newest rather than a mean.
_DERIVED = ("tokens_per_s", "units_per_s", "data_share", "peak_memory_bytes", "updated")


@HOOKS.register_module()
class LoggerHook(Hook):
    """Log training every ``interval`` optimizer steps, and each validation.

    Acts after steps and validations, on the main rank. Three places get what it knows:

    * the console and the log file: a line for each interval. On a terminal the line goes to the
      file only and a progress bar with the time left shows the newest step instead;
    * ``work_dir/metrics.jsonl``: a JSON object for every step (``jsonl_interval``) and validation.
      A resume cuts it back to the resumed step, so that no step stands in it twice;
    * ``runner.visualizer`` (TensorBoard, W&B, MLflow, SwanLab): the scalars of each interval.

    The loss of a line is exact: the sum of the loss over all units (target tokens) of the steps
    since the line before, over the number of these units. It is no mean of means and is not
    smoothed. Steps whose loss is not finite are left out of it and counted. Other metrics are
    weighted by the same units, the loss of a mixture's source (``loss/<name>``) by its own;
    ``grad_norm`` (before clipping) is a plain mean over the steps, ``lr`` is that of the line's
    last step. Speeds are sums over the interval too.

    Args:
        interval: optimizer steps between two lines. The first and the last step get one as well.
        jsonl_interval: optimizer steps between two JSON lines.
        progress_bar: None: when stdout is a terminal.

    Raises:
        ValueError: an interval below 1.
    """

    priority = "BELOW_NORMAL"

    def __init__(
        self, interval: int = 10, jsonl_interval: int = 1, progress_bar: bool | None = None
    ) -> None:
        for name, value in (("interval", interval), ("jsonl_interval", jsonl_interval)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"LoggerHook: {name}={value!r}; use a number of steps from 1 on")
        self.interval, self.jsonl_interval = interval, jsonl_interval
        self.progress_bar = progress_bar
        self._for_line, self._for_json = IntervalMeans(), IntervalMeans()
        self._metrics_log: MetricsLog | None = None
        self._bar: ProgressBar | None = None
        self._lr: dict[str, float] = {}
        self._start_step = self._steps_done = self._epoch = 0
        self._clock: tuple[int, float] | None = None  # step and time the ETA counts from
        self._write_failed = False

    def before_train(self, runner) -> None:
        """Opens ``metrics.jsonl``, cut back to the step the run starts from."""
        self._start_step = self._steps_done = runner.iter
        if runner.rank != 0:
            return
        self._metrics_log = log = MetricsLog(Path(runner.work_dir) / METRICS_FILE, runner.iter)
        if log.set_aside is not None:
            runner.logger.info(f"metrics of an earlier run are kept in {log.set_aside}")
        if log.num_dropped:
            runner.logger.info(
                f"{log.num_dropped} lines after step {runner.iter} were cut from {log.path}: "
                "these steps are trained again"
            )

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Notes the learning rate the step uses; a scheduler may change it before the line."""
        if runner.rank == 0:
            rates = runner.optim_wrapper.get_lr()["lr"]
            self._lr = {"lr": rates[0]}
            # Parameter groups with a rate of their own (paramwise_cfg) are logged beside it.
            for group, rate in enumerate(rates[1:], start=1):
                if rate != rates[0]:
                    self._lr[f"lr_group{group}"] = rate

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Adds the step to the interval and writes what is due."""
        if runner.rank != 0:
            return
        self._steps_done, self._epoch = runner.iter + 1, runner.epoch
        step = self._steps_done
        is_last = step == runner.max_iters
        self._for_line.add(outputs)
        self._for_json.add(outputs)
        if step % self.jsonl_interval == 0 or is_last:
            self._write(runner, {"mode": "train", **self._record(self._for_json)})
        self._show_bar(runner, outputs)
        if step % self.interval == 0 or is_last or step == self._start_step + 1:
            self._write_line(runner)
        if self._clock is None:  # the first step pays for compiling and allocating
            self._clock = (step, time.perf_counter())

    def after_val_epoch(self, runner, metrics: dict[str, float] | None = None) -> None:
        """Logs the result of a validation."""
        self._log_metrics(runner, "val", metrics)

    def after_test_epoch(self, runner, metrics: dict[str, float] | None = None) -> None:
        """Logs the result of a test."""
        self._log_metrics(runner, "test", metrics)

    def after_train(self, runner) -> None:
        """Ends the bar and writes steps that no line has yet (a run stopped by a hook)."""
        if self._for_line.num_steps:
            self._write_line(runner)
        self._close_bar()

    def after_run(self, runner) -> None:
        """Closes the files and the visualizer."""
        self.close()
        if runner.rank == 0:
            runner.visualizer.close()

    def close(self) -> None:
        """Ends the bar and closes the file; for a run that ends by an error as well."""
        self._close_bar()
        if self._metrics_log is not None:
            self._metrics_log.close()
            self._metrics_log = None

    def _record(self, means: IntervalMeans) -> dict[str, Any]:
        """The values of the interval under their logged names; the interval starts anew."""
        values = means.take()
        return {"step": self._steps_done, "epoch": self._epoch, **self._lr, **values}

    def _write_line(self, runner) -> None:
        """One line for people, and the same scalars to the visualizer."""
        record = self._record(self._for_line)
        scalars = {k: v for k, v in record.items() if k != "step" and not _not_finite(v)}
        runner.visualizer.add_scalars(
            {f"train/{name}": value for name, value in scalars.items()}, step=self._steps_done
        )
        if self._clock is not None and self._steps_done > self._clock[0]:
            step, time_s = self._clock
            per_step_s = (time.perf_counter() - time_s) / (self._steps_done - step)
            record["eta_s"] = per_step_s * (runner.max_iters - self._steps_done)
        known = {"step", "epoch", "loss", "grad_norm", "num_nonfinite_steps", "eta_s"}
        known.update(self._lr, _SUMMED, _DERIVED)
        record["extra"] = {
            k: v for k, v in record.items() if k not in known and not k.startswith(_UNITS)
        }
        if hasattr(runner.model, "unit_name"):  # e.g. "supervised tokens"
            record["unit_name"] = runner.model.unit_name
        line = train_line(record, max_iters=runner.max_iters, max_epochs=runner.max_epochs)
        runner.logger.info(line, extra={SHOWN_IN_BAR: self._bar is not None})

    def _show_bar(self, runner, outputs: dict[str, float]) -> None:
        if self._bar is None:
            wanted = sys.stdout.isatty() if self.progress_bar is None else self.progress_bar
            if not wanted:
                return
            self._bar = ProgressBar(runner.max_iters, self._start_step, runner.logger)
        values = {"loss": f"{outputs['loss']:.4f}", "lr": f"{self._lr['lr']:.2e}"}
        if "tokens_per_s" in outputs:
            values["tok/s"] = format_number(outputs["tokens_per_s"])
        self._bar.advance(self._steps_done, values)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _log_metrics(self, runner, mode: str, metrics: dict[str, float] | None) -> None:
        if runner.rank != 0 or not metrics:
            return
        scalars = {k: float(v) for k, v in metrics.items() if _is_number(v)}
        text = "  ".join(f"{name} {value:.4f}" for name, value in scalars.items())
        runner.logger.info(f"{mode} after step {self._steps_done}: {text}")
        finite = {f"{mode}/{k}": v for k, v in scalars.items() if not _not_finite(v)}
        runner.visualizer.add_scalars(finite, step=self._steps_done)
        if self._metrics_log is not None:
            self._write(runner, {"mode": mode, "step": self._steps_done, **scalars})

    def _write(self, runner, record: dict[str, Any]) -> None:
        """Writes a JSON line. A full disk must not end a training that can still go on."""
        try:
            self._metrics_log.write(record)
        except OSError as error:
            if not self._write_failed:
                self._write_failed = True
                runner.logger.warning(
                    f"cannot write {self._metrics_log.path}: {error}. Lines are missing from "
                    "here on; the training goes on. Free some space."
                )


class IntervalMeans:
    """Gathers the outputs of the steps of an interval and gives their exact means."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.num_steps = 0
        self._num_nonfinite = 0
        self._sums: dict[str, float] = {}
        self._weighted: dict[str, tuple[float, float]] = {}  # name -> (sum, weight)
        self._newest: dict[str, float] = {}

    def add(self, outputs: dict[str, float]) -> None:
        """Adds one step. ``loss`` and ``num_units`` are required."""
        self.num_steps += 1
        self._num_nonfinite += not math.isfinite(outputs["loss"])
        for name, value in outputs.items():
            if not _is_number(value):
                continue
            if name in _SUMMED or name.startswith(_UNITS):
                self._sums[name] = self._sums.get(name, 0) + value
            elif name in _DERIVED:
                self._newest[name] = value
            else:
                source = _UNITS + name.removeprefix("loss/")
                weight = 1.0 if name == "grad_norm" else outputs.get(source, outputs["num_units"])
                total, weights = self._weighted.get(name, (0.0, 0.0))
                if math.isfinite(value):
                    total, weights = total + weight * value, weights + weight
                self._weighted[name] = (total, weights)

    def take(self) -> dict[str, float]:
        """Means (of nothing: NaN), sums and speeds of the interval; starts the next one."""
        values = {k: s / w if w else math.nan for k, (s, w) in self._weighted.items()}
        values.update(self._sums)
        if self._sums.get("step_time_s"):
            step_time_s = self._sums["step_time_s"]
            values["tokens_per_s"] = self._sums["num_tokens"] / step_time_s
            values["units_per_s"] = self._sums["num_units"] / step_time_s
            if "data_time_s" in self._sums:
                values["data_share"] = self._sums["data_time_s"] / step_time_s
        if "peak_memory_bytes" in self._newest:
            values["peak_memory_bytes"] = self._newest["peak_memory_bytes"]
        if self._num_nonfinite:
            values["num_nonfinite_steps"] = self._num_nonfinite
        self._reset()
        return values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
