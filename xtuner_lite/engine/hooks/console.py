"""What a person sees while a run trains: a readable line per interval, a bar on a terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

#: LogRecord attribute of lines that the bar already shows; they go to the log file only.
SHOWN_IN_BAR = "shown_in_bar"


def format_number(value: float) -> str:
    """Four significant figures, plain where that is readable: 0.5313, 12.4, 1234, 3.1e-07."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def format_duration(seconds: float) -> str:
    """Seconds as 0:00:07, 3:25:00 or '2 days 3:25:00'."""
    total = max(0, round(seconds))
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
    return clock if days == 0 else f"{days} day{'s' if days > 1 else ''} {clock}"


def format_bytes(num_bytes: float) -> str:
    """Bytes as '812 MiB' or '1.43 GiB'."""
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.2f} GiB"


def train_line(record: dict[str, Any], *, max_iters: int, max_epochs: int | None) -> str:
    """The console line of one interval.

    Args:
        record: values of the interval; ``step`` is required, each other value is shown when there.
        max_iters: optimizer steps of the whole run.
        max_epochs: epochs of the whole run, None when the run is counted in steps.
    """
    step, width = record["step"], len(str(max_iters))
    parts = [f"step {step:>{width}}/{max_iters}"]
    if "epoch" in record:
        epoch = record["epoch"] + 1
        parts.append(f"epoch {epoch}/{max_epochs}" if max_epochs else f"epoch {epoch}")
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "lr" in record:
        parts.append(f"lr {record['lr']:.3e}")
    if "grad_norm" in record:
        parts.append(f"grad_norm {format_number(record['grad_norm'])}")
    for name, value in record.get("extra", {}).items():
        parts.append(f"{name} {format_number(value)}")
    if "tokens_per_s" in record:
        parts.append(f"{format_number(record['tokens_per_s'])} tokens/s")
    if "units_per_s" in record and "unit_name" in record:
        parts.append(f"{format_number(record['units_per_s'])} {record['unit_name']}/s")
    if record.get("data_share", 0.0) >= 0.05:  # below that the data is no news
        parts.append(f"waiting for data {record['data_share']:.0%}")
    if "peak_memory_bytes" in record:
        parts.append(f"memory {format_bytes(record['peak_memory_bytes'])}")
    if "eta_s" in record:
        parts.append(f"eta {format_duration(record['eta_s'])}")
    if record.get("num_nonfinite_steps"):
        parts.append(f"({record['num_nonfinite_steps']} steps not finite, left out of the loss)")
    return "  ".join(parts)


class _AboveBar:
    """A text stream that prints above a live bar."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        from tqdm import tqdm

        if text:
            tqdm.write(text, file=self.stream, end="")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


class ProgressBar:
    """A bar with ETA at the bottom of a terminal; log lines are printed above it.

    Args:
        total: optimizer steps of the whole run.
        initial: steps done before this run (a resume), which do not count for the speed.
        logger: its console handlers are redirected while the bar lives. Its file handlers are left
            alone and stay plain.
    """

    def __init__(self, total: int, initial: int, logger: logging.Logger) -> None:
        from tqdm import tqdm

        self._bar: tqdm = tqdm(
            total=total,
            initial=initial,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            file=sys.stdout,
            # A steady figure: MMEngine and the log line average over the run as well.
            smoothing=0.1,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}{postfix}]",
        )
        self._redirected: list[tuple[logging.StreamHandler, Any]] = []
        for handler in logger.handlers:
            is_console = isinstance(handler, logging.StreamHandler) and not isinstance(
                handler, logging.FileHandler
            )
            if is_console:
                self._redirected.append((handler, handler.stream))
                handler.setStream(_AboveBar(handler.stream))
                handler.addFilter(_not_shown_in_bar)

    def advance(self, step: int, values: dict[str, str]) -> None:
        """Moves the bar to ``step`` and shows ``values`` (name -> text) behind it."""
        self._bar.set_postfix_str("  ".join(f"{k} {v}" for k, v in values.items()), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the console back to the logger."""
        self._bar.close()
        for handler, stream in self._redirected:
            handler.setStream(stream)
            handler.removeFilter(_not_shown_in_bar)
        self._redirected.clear()


def _not_shown_in_bar(record: logging.LogRecord) -> bool:
    return not getattr(record, SHOWN_IN_BAR, False)
