"""xtuner-lite train: check a config, then train."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train a model from a config file or the name of a shipped config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xtuner-lite train``."""
    parser.add_argument("config", help="a config file, or a name from `xtuner-lite list-cfg`")
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
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the config, e.g. train_cfg.max_epochs=1 optim_wrapper.optimizer.lr=1e-4",
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file that registers parts",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check all, show the data, train nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code (0, or 2 for a config that is refused)."""
    from xtuner_lite.config import check_config, load_config, load_plugins, report_problems

    cfg = load_config(args.config, overrides=[*args.cfg_options, *_options_of(args)])
    load_plugins(cfg, args.plugin)
    problems = check_config(cfg)
    if problems:
        print(report_problems(problems))
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
