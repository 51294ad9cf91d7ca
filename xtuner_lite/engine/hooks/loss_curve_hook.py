"""Draws ``loss_curve.png`` when training ends."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from xtuner_lite.engine.hooks.metrics_log import METRICS_FILE, read_metrics, smooth
from xtuner_lite.registry import HOOKS


@HOOKS.register_module()
class LossCurveHook(Hook):
    """Draw training and validation loss over optimizer steps, from ``metrics.jsonl``.

    Acts after training, on the main rank. A resumed run shows the whole run. A picture that cannot
    be drawn makes a warning: the training is done and saved.

    Args:
        file_name: the picture, in ``work_dir``.
    """

    priority = "LOWEST"

    def __init__(self, file_name: str = "loss_curve.png") -> None:
        self.file_name = file_name

    def after_train(self, runner) -> None:
        """Draws the picture."""
        log_path = Path(runner.work_dir) / METRICS_FILE
        if runner.rank != 0:
            return
        if not log_path.is_file():
            runner.logger.warning(f"no {self.file_name}: LoggerHook wrote no {log_path}")
            return
        target = Path(runner.work_dir) / self.file_name
        try:
            draw_loss_curve(read_metrics(log_path)[0], target, title=runner.experiment_name)
        except Exception as error:  # fonts, disk, back-end: none of it is worth a failed run
            runner.logger.warning(f"{target} was not drawn: {type(error).__name__}: {error}")
            return
        runner.logger.info(f"loss curve: {target}")


def draw_loss_curve(records: list[dict[str, Any]], target: Path, *, title: str = "") -> None:
    """Draws the losses of metrics records into a PNG.

    Args:
        records: see metrics_log.read_metrics.
        target: the PNG file; written beside and renamed.

    Raises:
        ValueError: no record has a training loss.
    """
    train = _points(records, "train")
    if not train:
        raise ValueError(f"no training loss among {len(records)} records; train at least one step")
    val = _points(records, "val")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # leaves pyplot's back-end alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    window = max(1, len(train) // 25)
    axes.plot(
        steps,
        losses,
        color="#4c78a8",
        alpha=0.35 if window > 1 else 1.0,
        linewidth=1,
        marker="o" if len(train) < 3 else None,
        label="train, each step" if window > 1 else f"train, last {losses[-1]:.4f}",
    )
    if window > 1:
        means = smooth(losses, window)
        label = f"train, mean of {window} steps, last {means[-1]:.4f}"
        axes.plot(steps, means, color="#4c78a8", linewidth=2, label=label)
    if val:
        val_steps, val_losses = zip(*val, strict=True)
        label = f"validation, last {val_losses[-1]:.4f}, best {min(val_losses):.4f}"
        axes.plot(val_steps, val_losses, color="#e45756", marker="o", markersize=4, label=label)
    axes.set(xlabel="optimizer steps", ylabel="loss per unit (nats per token for SFT)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    aside = target.with_name(target.name + ".tmp")
    figure.savefig(aside, format="png")
    os.replace(aside, target)


def _points(records: list[dict[str, Any]], mode: str) -> list[tuple[int, float]]:
    """(step, loss) of the records of a mode whose loss is a finite number, by step."""
    points = {
        r["step"]: float(r["loss"])
        for r in records
        if r.get("mode") == mode and isinstance(r.get("loss"), (int, float))
    }
    return sorted((s, v) for s, v in points.items() if math.isfinite(v))
