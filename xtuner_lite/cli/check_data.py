"""``xtuner-lite check-data``: what stands in a config's data, before a model is loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from xtuner_lite.cli._config_arguments import add_config_arguments, checked_config

if TYPE_CHECKING:
    from xtuner_lite.data.dataloader import StepDataLoader
    from xtuner_lite.data.report import DataReport

HELP = "report on a config's data: counts, lengths, duplicates, empty answers, steps"
ALIAS = "check-custom-dataset"

#: Samples of a stream that are looked at without --samples.
_NUM_OF_STREAM = 200
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xtuner-lite check-data``."""
    parser.description = (
        "Builds the tokenizer and the data of a config as training does, with every data set of "
        "yours or ours, and reports on them. No model is loaded, nothing is written."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="look into the first N packed samples only (all; 200 of a stream). The ledger counts "
        "all rows",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; returns the exit code (0, or 2 for a config that is refused)."""
    # The ledger stands in the report; as a log line it would come twice.
    cfg = checked_config(args.config, args, ["log_level='WARNING'"])
    if cfg is None:
        return 2
    from xtuner_lite.data.report import examine, format_overlap
    from xtuner_lite.data.segments import is_endless
    from xtuner_lite.runner.dry_run import describe_run_size
    from xtuner_lite.runner.runner import Runner

    runner = Runner.from_cfg(cfg)
    train: DataReport | None = None
    for name in _LOADERS:
        if name != "train_dataloader" and cfg.get(name) is None:
            continue
        loader = runner.prepare_data(name)
        limit = args.samples or (_NUM_OF_STREAM if is_endless(loader.dataset) else None)
        report = examine(loader.dataset, runner.tokenizer, limit)
        print(f"== {name}\n\n{_describe(loader, report, limit)}\n")
        if name == "train_dataloader":
            train = report
            print(f"{describe_run_size(cfg, loader)}\n{_describe_batch(loader)}\n")
        elif train is not None and report is not None:
            print(format_overlap(train, report, name) + "\n")
    return 0


def _describe(loader: StepDataLoader, report: DataReport | None, limit: int | None) -> str:
    """The ledger of a data set, if it has one, and what its samples hold."""
    from xtuner_lite.data.report import format_report
    from xtuner_lite.data.segments import is_endless

    dataset = loader.dataset
    parts = []
    ledger = getattr(dataset, "ledger", None)
    if ledger is not None:
        parts.append(ledger.report())
    if report is None:
        keys = dataset[0].keys() if isinstance(dataset[0], dict) else [type(dataset[0]).__name__]
        parts.append(
            f"{type(dataset).__name__}: {len(dataset):,} samples of {', '.join(map(str, keys))}; "
            "without input_ids and labels there are no tokens to report on"
        )
        return "\n\n".join(parts)
    if is_endless(dataset):
        parts.append(f"From here on: the first {report.num_samples:,} samples of a stream")
    elif limit is not None and report.num_samples < len(dataset):
        parts.append(f"From here on: the first {report.num_samples:,} of {len(dataset):,} samples")
    num_pieces = len(report.lengths) - getattr(ledger, "rows_kept", len(report.lengths))
    if num_pieces > 0 and limit is None:
        parts.append(
            f"Rows cut by packing make {num_pieces:,} more pieces; each counts as a row below"
        )
    parts.append(format_report(report))
    return "\n\n".join(parts)


def _describe_batch(loader: StepDataLoader) -> str:
    """The largest micro-batch of the first epoch, or of a stream's first step, and its memory."""
    from xtuner_lite.data.segments import is_endless

    dataset = loader.dataset
    lengths = getattr(dataset, "lengths", None)
    largest, most = None, -1
    for step in range(1 if is_endless(dataset) else len(loader)):
        for tickets in loader.plan.micro_batches(step):
            size = 0
            if lengths is not None:
                size = len(tickets) * max(int(lengths[ticket.index]) for ticket in tickets)
            if size > most:
                largest, most = tickets, size
        if lengths is None:  # nothing to choose by
            break
    batch = loader.collate_fn([dataset[ticket.index] for ticket in largest])
    tensors = {key: value for key, value in batch.items() if hasattr(value, "element_size")}
    num_bytes = sum(value.numel() * value.element_size() for value in tensors.values())
    text = f"largest micro-batch: {len(largest)} sample(s)"
    if "input_ids" in tensors:
        rows, columns = tensors["input_ids"].shape
        padding = 1 - batch.get("num_tokens", rows * columns) / (rows * columns)
        text += f", {rows} x {columns:,} = {rows * columns:,} tokens ({padding:.1%} padding)"
    return f"{text}, {_bytes(num_bytes)} of tensors"


def _bytes(count: int) -> str:
    if count < 2**10:
        return f"{count} B"
    return f"{count / 2**10:.1f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"
