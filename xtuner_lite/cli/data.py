"""``xtuner-lite data diff`` and ``xtuner-lite data at-step``: questions about a config's data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from xtuner_lite.cli._config_arguments import add_config_arguments, checked_config

if TYPE_CHECKING:
    from xtuner_lite.data.dataloader import StepDataLoader
    from xtuner_lite.data.diff import Comparison, DataDiff

HELP = "compare the data of two configs (diff); rows of an optimizer step (at-step)"

_BEFORE, _BEHIND = 12, 36  # tokens shown around a first difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xtuner-lite data``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    diff = actions.add_parser(
        "diff",
        help="which tokens and labels changed between two configs, row by row",
        description="Compares the training data of two configs row by row. Packing and order are "
        "not compared. Exit code: 0 if every row is the same, 1 if not.",
    )
    add_config_arguments(diff, "A", "B")
    diff.add_argument(
        "-n", type=int, default=3, metavar="N", help="differences shown of each kind (default: 3)"
    )
    at_step = actions.add_parser(
        "at-step",
        help="the rows that an optimizer step sees",
        description="Prints the rows of an optimizer step. Steps are counted as in the log: the "
        "first is 1.",
    )
    add_config_arguments(at_step)
    at_step.add_argument("step", type=int, metavar="N", help="number of the step, from 1")
    at_step.add_argument("--preview", action="store_true", help="show the tokens of its samples")


def run(args: argparse.Namespace) -> int:
    """Answer; returns the exit code (diff: 1 if the data differ; 2 for a refused config)."""
    return {"diff": _diff, "at-step": _at_step}[args.action](args)


def _prepare(config: str, args: argparse.Namespace) -> tuple[StepDataLoader, Any] | None:
    """(training data, tokenizer) of a config; None if it is refused."""
    cfg = checked_config(config, args, ["log_level='WARNING'"])
    if cfg is None:
        return None
    from xtuner_lite.runner.runner import Runner

    runner = Runner.from_cfg(cfg)
    return runner.prepare_data(), runner.tokenizer


# ---------------------------------------------------------------- diff


def _diff(args: argparse.Namespace) -> int:
    first = _prepare(args.A, args)
    second = _prepare(args.B, args) if first is not None else None
    if first is None or second is None:
        return 2
    from xtuner_lite.data.diff import Comparison

    comparison = Comparison(first[0].dataset, second[0].dataset)
    print(_summary(comparison.diff))
    tokenizers = (first[1], second[1])
    for change, row_ids in comparison.diff.changed.items():
        for row_id in row_ids[: args.n]:
            print(f"\n{change}: {row_id}")
            if not change.startswith("only"):
                print(_first_difference(comparison, row_id, tokenizers))
        if len(row_ids) > args.n > 0:
            print(f"... {change}: {len(row_ids) - args.n:,} more row(s)")
    return 0 if comparison.diff.is_equal else 1


def _summary(diff: DataDiff) -> str:
    pairs = (
        ("rows", diff.num_rows), ("tokens", diff.num_tokens), ("learnt tokens", diff.num_learnt)
    )  # fmt: skip
    lines = [f"{'':<16}{'A':>14}{'B':>14}{'B - A':>14}"]
    lines += [f"{label:<16}{a:>14,}{b:>14,}{b - a:>+14,}" for label, (a, b) in pairs]
    lines += ["", f"{'rows equal':<16}{diff.num_equal:>14,}"]
    lines += [f"{change:<16}{len(rows):>14,}" for change, rows in diff.changed.items() if rows]
    if any(rows for change, rows in diff.changed.items() if change.startswith("only")):
        lines.append("A row that is missing was skipped: xtuner-lite check-data says why.")
    if not diff.num_equal and diff.num_rows[0] == len(diff.changed["only in A"]):
        lines.append(
            "No row is in both: rows are known by 'file:line' as the configs name the file. Name "
            "the files alike in both configs."
        )
    return "\n".join(lines)


def _first_difference(comparison: Comparison, row_id: str, tokenizers: tuple[Any, Any]) -> str:
    """Both versions of a row around their first difference; learnt tokens stand in [[ ]]."""
    from xtuner_lite.data.diff import first_difference
    from xtuner_lite.data.preview import render_tokens

    rows = [comparison.row(side, row_id) for side in (0, 1)]
    at = first_difference(*rows)
    begin = max(0, at - _BEFORE)
    sizes = [f"{len(row):,} tokens, {int(row.learnt.sum()):,} learnt" for row in rows]
    lines = [f"  A has {sizes[0]}; B has {sizes[1]}; the first difference is at token {at:,}"]
    for side, row, tokenizer in zip("AB", rows, tokenizers):
        text = render_tokens(row, tokenizer, begin, at + _BEHIND, color=False)
        before = "... " if begin else ""
        behind = " ..." if at + _BEHIND < len(row) else ""
        body = f"{before}{text}{behind}".replace("\n", "\n    | ")
        lines.append(f"  {side} | {body}")
    return "\n".join(lines)


# ---------------------------------------------------------------- at-step


def _at_step(args: argparse.Namespace) -> int:
    if args.step < 1:
        raise ValueError(f"step {args.step}: steps are counted from 1, as in the log")
    prepared = _prepare(args.config, args)
    if prepared is None:
        return 2
    from xtuner_lite.data.preview import render_preview
    from xtuner_lite.data.segments import has_tokens, is_endless, segments_of

    loader, tokenizer = prepared
    samples = loader.samples_of_step(args.step - 1)
    epoch = (args.step - 1) // len(loader)
    place = (
        f"epoch {epoch + 1}, step {(args.step - 1) % len(loader) + 1:,} of {len(loader):,} in it"
    )
    if is_endless(loader.dataset):
        place = "of a stream"
    print(f"step {args.step:,}: {place}; {len(samples)} sample(s)")
    for index, sample in samples:
        if not has_tokens(sample):
            print(f"  sample {index}: rows {', '.join(map(str, sample.get('row_ids', [])))}")
            continue
        segments = segments_of(sample, index)
        print(f"  sample {index}: {sum(map(len, segments)):,} tokens, {len(segments)} segment(s)")
        if args.preview:
            print(render_preview(sample, tokenizer, color=False, max_tokens=None) + "\n")
            continue
        for segment in segments:
            print(
                f"    {segment.title}  {len(segment):,} tokens, "
                f"{int(segment.learnt.sum()):,} learnt"
            )
    return 0
