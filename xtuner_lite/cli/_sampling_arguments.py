"""The sampling options of the commands that talk."""

from __future__ import annotations

import argparse

from xtuner_lite.models.sampling import Sampling


def add_sampling_arguments(
    group: argparse._ArgumentGroup, *, temperature: float, top_p: float
) -> None:
    """Adds the options; ``temperature`` and ``top_p`` are the defaults of the command."""
    group.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest reply (default: 512)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"default: {temperature:g}; 0 takes the likeliest token, 0.7 varies",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help=f"nucleus sampling (default: {top_p:g}; 1: none)",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from K tokens (default: all)"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="default: 1 (none)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="default: another one each time")


def sampling_of(args: argparse.Namespace, *, stop_words: tuple[str, ...] = ()) -> Sampling:
    """The parsed options.

    Raises:
        ValueError: one of them is out of its range.
    """
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop_words=stop_words,
    )
