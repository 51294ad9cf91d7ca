"""Curves of a run as SVG pictures that read on a light and on a dark page."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

from xtuner_lite.engine.hooks.metrics_log import smooth
from xtuner_lite.report.run_record import RunRecord

Points = list[tuple[int, float]]

_BLUE, _RED, _INK = "#4c8bd6", "#e4695e", "#808a96"
#: Most points of a line in a picture; longer runs are drawn as means of equal stretches.
_MAX_POINTS = 1500
#: Shown first, in this order; whatever else a run logs follows by name.
_FIRST = ("lr", "grad_norm", "token_accuracy", "tokens_per_s", "peak_memory_bytes")
#: Fields of a record that are no curve.
_NO_CURVE = {"step", "epoch", "loss", "num_units", "num_tokens", "step_time_s", "units_per_s"}
_LABELS = {
    "loss": "loss per unit (nats per token for SFT)",
    "lr": "learning rate",
    "token_accuracy": "share of the learnt tokens that were the likeliest",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_s": "tokens per second",
    "peak_memory_bytes": "peak memory, GiB",
    "data_share": "share of the time spent waiting for data",
    "data_time_s": "seconds a step waits for data",
}


@dataclass(frozen=True)
class Curve:
    """One picture.

    Args:
        name: of the metric.
        label: of the picture, with the unit.
        svg: the picture.
        summary: its last values in words, for those who do not see it.
    """

    name: str
    label: str
    svg: str
    summary: str


def draw_curves(run: RunRecord) -> list[Curve]:
    """A picture for each metric with at least one finite number, the loss first."""
    train, val = run.of_mode("train"), run.of_mode("val")
    names = {name for record in (*train, *val) for name in record} - _NO_CURVE
    known = [name for name in _FIRST if name in names]
    others = sorted(name for name in names - set(known) if not name.startswith("units/"))
    curves = []
    for name in ("loss", *known, *others):
        lines = {"train": _points(train, name), "validation": _points(val, name)}
        if any(lines.values()):
            curves.append(_draw(name, lines))
    return curves


def _points(records: list[dict], name: str) -> Points:
    """(step, value) where the value is a finite number; the newest of each step."""
    scale = 2.0**-30 if name.endswith("_bytes") else 1.0
    points = {
        record["step"]: scale * float(value)
        for record in records
        if isinstance(value := record.get(name), (int, float)) and not isinstance(value, bool)
    }
    return sorted((step, value) for step, value in points.items() if math.isfinite(value))


def thin(points: Points, most: int = _MAX_POINTS) -> Points:
    """At most ``most`` points: means of equal stretches; short lines as they are."""
    if len(points) <= most:
        return points
    width = math.ceil(len(points) / most)
    stretches = [points[start : start + width] for start in range(0, len(points), width)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in stretches]


def _draw(name: str, lines: dict[str, Points]) -> Curve:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    label, summary = _LABELS.get(name, name), []
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for kind, points in lines.items():
            if not points:
                continue
            summary.append(f"{kind}: {points[-1][1]:.4g} at step {points[-1][0]}")
            _add_line(axes, kind, thin(points), noisy=name == "loss")
        axes.set_xlabel("optimizer steps", color=_INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(colors=_INK)
        axes.spines[:].set_color(_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, color=_INK)
        if all(lines.values()) or name == "loss":
            axes.legend(frameon=False, labelcolor=_INK)
        text = io.StringIO()
        # No date and a fixed salt: the same run gives the same file.
        with rc_context({"svg.hashsalt": name}):
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return Curve(name, label, text.getvalue(), "; ".join(summary))


def _add_line(axes, kind: str, points: Points, *, noisy: bool) -> None:
    steps, values = zip(*points, strict=True)
    if kind == "validation":
        axes.plot(steps, values, color=_RED, marker="o", markersize=4, label=kind)
        return
    window = max(1, len(points) // 25) if noisy else 1
    faint = 0.35 if window > 1 else 1.0
    marker = "o" if len(points) < 3 else None
    label = kind if window == 1 else "train, each step"
    axes.plot(steps, values, color=_BLUE, alpha=faint, linewidth=1.2, marker=marker, label=label)
    if window > 1:
        label = f"train, mean of {window}"
        axes.plot(steps, smooth(values, window), color=_BLUE, linewidth=2, label=label)
