"""xtuner-lite train: check a config, then train."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtuner_lite.cli._config_arguments import add_config_arguments, checked_config

HELP = "train a model from a config file or the name of a shipped config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xtuner-lite train``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--work-dir", help="for checkpoints and logs (default: ./work_dirs/<config>)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="PATH",
        help="go on from the newest valid checkpoint of the work_dir, or from PATH",
    )
    parser.add_argument(
        "--load-from", metavar="PATH", help="weights to start from (adapter or model)"
    )
    parser.add_argument("--seed", type=int, help="seed of the run")
    parser.add_argument(
        "--deterministic", action="store_true", help="deterministic GPU kernels (slower)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check all, show the data, train nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code (0, or 2 for a config that is refused)."""
    cfg = checked_config(args.config, args, _options_of(args))
    if cfg is None:
        return 2
    if args.dry_run:
        from xtuner_lite.runner.dry_run import dry_run

        return dry_run(cfg)
    from xtuner_lite.runner.runner import Runner

    Runner.from_cfg(cfg).train()
    return 0


def _options_of(args: argparse.Namespace) -> list[str]:
    """The plain options as --cfg-options."""
    given = {
        "work_dir": args.work_dir,
        "resume": args.resume,
        "load_from": args.load_from,
        "randomness.seed": args.seed,
        "randomness.deterministic": args.deterministic or None,
    }
    paths = ("work_dir", "load_from")
    return [
        f"{key}={str(Path(value)) if key in paths else value!r}"
        for key, value in given.items()
        if value is not None
    ]
