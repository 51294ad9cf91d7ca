"""``xtuner-lite estimate``: the memory a config needs, before anything is loaded."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from xtuner_lite.cli._config_arguments import add_config_arguments, checked_config

if TYPE_CHECKING:
    from xtuner_lite.runner.estimate import Estimate

HELP = "memory per device of a config, for every strategy, and what would lower it"

#: engine.memory.PLACEMENTS, without importing torch for it.
STRATEGIES = (
    "single", "ddp", "fsdp2", "fsdp2_offload",
    "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload",
)  # fmt: skip
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xtuner-lite estimate``."""
    parser.description = (
        "Reads the model's config.json, no weights and no data, and prints memory per device."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--devices", type=_positive, default=1, metavar="N", help="processes, one device each (1)"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--strategy", choices=STRATEGIES, help="in place of the config's")
    kinds.add_argument(
        "--deepspeed", metavar="NAME_OR_FILE", help="zero1, zero2, zero3, zero2_offload, ... "
        "or a DeepSpeed JSON file",
    )  # fmt: skip
    parser.add_argument(
        "--device-memory", type=_bytes, metavar="SIZE", help="of one device, e.g. 24GiB or 80GB: "
        "says what fits",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what the devices are (cuda)"
    )
    parser.add_argument(
        "--max-length", type=_positive, metavar="N", help="tokens of a sample, if the data does "
        "not say it",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns the exit code (0, or 2 for a config that is refused)."""
    cfg = checked_config(args.config, args)
    if cfg is None:
        return 2
    from xtuner_lite.config import load_plugins
    from xtuner_lite.runner.estimate import estimate

    load_plugins(cfg)
    result = estimate(
        cfg,
        devices=args.devices,
        placement=args.strategy,
        deepspeed=args.deepspeed,
        device_type=args.device,
        max_length=args.max_length,
    )
    print(format_estimate(result, args.device_memory))
    return 0


def format_estimate(result: Estimate, device_memory: int | None = None) -> str:
    """The estimate as text: settings, a table of strategies, changes.

    Args:
        result: what is shown.
        device_memory: bytes of one device; None says nothing about what fits.
    """
    from xtuner_lite.runner.estimate import COLUMNS, GIB, USABLE

    plan, names = result.plan, (*COLUMNS, "total", "host")
    parameters = result.trainable + result.frozen
    name = getattr(plan.optimizer["type"], "__name__", plan.optimizer["type"])
    is_on = plan.method.get("activation_checkpointing", False)
    lines = [
        f"{result.model_name}: {parameters:,} parameters, {result.trainable:,} of them train"
        + (f"; base quantised: {plan.quantization}" if plan.quantization else ""),
        f"a micro-batch of {plan.batch_size} x {plan.length:,} tokens, all of them learnt; "
        f"{plan.dtype}; {name}; activation checkpointing {'on' if is_on else 'off'}",
        "",
        f"GiB per device, {plan.devices} x {plan.device_type} (> this config)",
    ]
    width = max(map(len, names)) + 1
    lines.append(" " * 16 + "".join(f"{column:>{width}}" for column in names))
    limit = None if device_memory is None else USABLE * device_memory
    for placement, memory in result.table.items():
        mark = ">" if placement == plan.placement else " "
        values = "".join(f"{getattr(memory, column) / GIB:>{width}.2f}" for column in names)
        lines.append(f"{mark} {placement:<14}{values}{_fits(memory.total, limit)}")
    if limit is not None:
        lines.append(f"fits: at most {USABLE:.0%} of {device_memory / GIB:.1f} GiB")
    lines += ["", "what would lower it most, each change by itself:"]
    for change in result.changes:
        lines.append(
            f"  -{change.saved / GIB:.2f} -> {change.memory.total / GIB:.2f} GiB"
            f"{_fits(change.memory.total, limit)}  {change.text} ({change.cost})"
        )
    if not result.changes:
        lines.append("  nothing that is known here")
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join(lines)


def _fits(total: int, limit: float | None) -> str:
    return "" if limit is None else "  fits" if total <= limit else "  too large"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _bytes(text: str) -> int:
    """'24GiB', '80GB', '16g' or plain bytes, as a number of bytes."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 24GiB or 80GB")
    return int(float(match[1]) * _UNITS[match[2]])
