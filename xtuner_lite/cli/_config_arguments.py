"""The arguments of every command that takes a config, and the checked config they give."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config

CONFIG_HELP = "a config file, or a name from `xtuner-lite list-cfg`"


def add_config_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds one positional argument per name (default: config), --cfg-options and --plugin."""
    for name in names or ("config",):
        parser.add_argument(name, metavar=name.upper(), help=CONFIG_HELP)
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


def checked_config(
    config: str, args: argparse.Namespace, options: Sequence[str] = ()
) -> Config | None:
    """The config with its options and plug-ins; None, and its problems printed, if it is refused.

    Args:
        config: file or shipped name.
        args: with cfg_options and plugin.
        options: further KEY=VALUE, over args.cfg_options.
    """
    from xtuner_lite.config import check_config, declare_plugins, load_config, report_problems

    cfg = load_config(config, overrides=[*args.cfg_options, *options])
    declare_plugins(cfg, args.plugin)  # read, not imported: a plug-in may import torch
    problems = check_config(cfg)
    if problems:
        print(report_problems(problems), file=sys.stderr)
        return None
    return cfg
