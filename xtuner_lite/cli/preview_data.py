"""``xtuner-lite preview-data``: the samples of a config as the model will get them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner_lite.cli._config_arguments import add_config_arguments, checked_config

if TYPE_CHECKING:
    from xtuner_lite.data.dataloader import StepDataLoader

HELP = "show samples with what is learnt, in the terminal or as a page"
ALIAS = "log-dataset"

_LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}


class OutputError(ValueError):
    """A file that is not overwritten."""

    exit_code = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xtuner-lite preview-data``."""
    parser.description = (
        "Shows packed samples in the order of training, with what is learnt. No model is loaded."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "-n", type=int, default=None, metavar="N", help="samples shown (default: 2, a page 20)"
    )
    parser.add_argument(
        "--row",
        metavar="ID",
        help="only this row: 'data.json:12', or its end ':12' (a page shows its whole sample)",
    )
    parser.add_argument("--data", choices=_LOADERS, default="train", help="which data (train)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=None,
        metavar="N",
        help="tokens shown of each sample in the terminal (default: all)",
    )
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="colours (auto)"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page to open in a browser, offline"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(args: argparse.Namespace) -> int:
    """Show the samples; returns the exit code (0, or 2 for a config that is refused)."""
    if args.html is not None and args.html.exists() and not args.force:
        raise OutputError(f"{args.html} exists and is not overwritten; give --force to do so")
    cfg = checked_config(args.config, args, ["log_level='WARNING'"])
    if cfg is None:
        return 2
    from xtuner_lite.data.preview import render_preview
    from xtuner_lite.data.preview_html import render_page
    from xtuner_lite.data.segments import is_endless, rows_alone
    from xtuner_lite.runner.runner import Runner

    runner = Runner.from_cfg(cfg)
    loader = runner.prepare_data(_LOADERS[args.data])
    _check_samples(loader, runner.tokenizer)
    chosen = _choose(loader, args)
    if args.html is not None:
        samples = [(label, loader.dataset[index]) for label, index in chosen]
        ledger = getattr(loader.dataset, "ledger", None)
        title = f"{Path(args.config).name}: {args.data} data"
        page = render_page(samples, runner.tokenizer, title=title, ledger=ledger)
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(page, encoding="utf-8")
        whole = "" if is_endless(loader.dataset) else f" of {len(loader.dataset)}"
        print(f"wrote {len(samples)}{whole} samples to {args.html}")
        return 0
    color = args.color == "always" or (
        args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    for label, index in chosen:
        sample = loader.dataset[index]
        if args.row is not None:
            sample = rows_alone(sample, args.row)
        text = render_preview(sample, runner.tokenizer, color=color, max_tokens=args.max_tokens)
        print(f"{label}\n{text}\n")
    return 0


def _check_samples(loader: StepDataLoader, tokenizer: object) -> None:
    from xtuner_lite.data.segments import has_tokens

    sample = loader.dataset[0]
    if tokenizer is None or not has_tokens(sample):
        raise ValueError(
            "nothing to preview: the config has no tokenizer, or the samples hold no input_ids and "
            f"labels (they hold {', '.join(map(str, sample))}). See docs/howto/add_a_dataset.md "
            "for the form of a sample."
        )


def _choose(loader: StepDataLoader, args: argparse.Namespace) -> list[tuple[str, int]]:
    """(what it is, index) of each sample to show."""
    number = args.n if args.n is not None else (20 if args.html is not None else 2)
    order = loader.sampler.order(0)
    if args.row is None:
        return [
            (f"Sample {int(index)}, number {place} in the order of training", int(index))
            for place, index in enumerate(order[:number], start=1)
        ]
    from xtuner_lite.data.segments import samples_with_row

    found = samples_with_row(loader.dataset, args.row)
    return [(f"Sample {index}", index) for index in found[: args.n]]
