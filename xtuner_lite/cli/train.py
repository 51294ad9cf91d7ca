"""xtuner-lite train: check a config, then train, in this process or in several."""

from __future__ import annotations

import argparse
import faulthandler
import io
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner_lite.cli._config_arguments import add_config_arguments, checked_config

if TYPE_CHECKING:
    from mmengine.config import Config

HELP = "train a model from a config file or the name of a shipped config"

STRATEGIES = {"single": "SingleDevice", "ddp": "DDP", "fsdp2": "FSDP2"}
LAUNCHERS = ("none", "pytorch", "slurm", "mpi")

#: Variables in which outside launchers give a process its number.
_RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


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
    _add_scale_arguments(parser.add_argument_group("several processes"))


def _add_scale_arguments(group: argparse._ArgumentGroup) -> None:
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument(
        "--deepspeed",
        metavar="NAME_OR_FILE",
        help="zero1, zero2, zero3, zero2_offload, zero3_offload or a DeepSpeed JSON file",
    )
    kinds.add_argument("--strategy", choices=STRATEGIES, help="how the model is spread")
    group.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="start N processes on this machine (one per GPU); with --strategy ddp by default",
    )
    group.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines of the run")
    group.add_argument(
        "--node-rank", type=int, default=0, metavar="I", help="number of this machine, from 0"
    )
    group.add_argument("--master-addr", metavar="HOST", help="address of machine 0")
    group.add_argument(
        "--master-port", type=int, metavar="PORT", help="a free port of machine 0 (default 29500)"
    )
    group.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        help="what started this process: torchrun (pytorch), srun (slurm), mpirun (mpi)",
    )
    # The deepspeed command adds this to a program's options; the number is read from the
    # environment.
    group.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code (0, or 2 for a config that is refused)."""
    from xtuner_lite.cli._rank import enter_rank, run_rank

    if enter_rank():
        return run_rank(lambda: _train(args))
    starts_ranks = args.nproc is not None or args.nnodes > 1
    if starts_ranks and (refused := _why_not_start(args)):
        print(f"error: {refused}", file=sys.stderr)
        return 2
    if not starts_ranks or args.dry_run:
        return _train(args)
    return _launch(args)


def _train(args: argparse.Namespace) -> int:
    cfg = _config(args)
    if cfg is None:
        return 2
    if args.dry_run:
        from xtuner_lite.runner.dry_run import dry_run

        return dry_run(cfg)
    from xtuner_lite.runner.runner import Runner

    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)  # a crash in native code still shows where it was
    Runner.from_cfg(cfg).train()
    return 0


def _launch(args: argparse.Namespace) -> int:
    """Check the config once, here; then start the processes."""
    from xtuner_lite.cli._launch import Plan, launch

    plan = Plan(
        nproc=args.nproc or 1, nnodes=args.nnodes, node_rank=args.node_rank,
        master_addr=args.master_addr, master_port=args.master_port,
    )  # fmt: skip
    cfg = _config(args)
    if cfg is None:
        return 2
    if plan.world_size == 1:
        return _train(args)
    strategy = cfg.get("strategy")
    if strategy is None:
        args.strategy = "ddp"
        if _config(args) is None:
            return 2
    elif _name_of(strategy) == "SingleDevice":
        print(
            f"error: strategy SingleDevice runs in one process, and {plan.world_size} are to be "
            "started; leave out --nproc, or choose --strategy ddp, --strategy fsdp2 or --deepspeed",
            file=sys.stderr,
        )
        return 2
    return launch(plan, "xtuner_lite.cli.main", ["train", *words_of_rank(args)])  # does not return


def _why_not_start(args: argparse.Namespace) -> str | None:
    """Why ``--nproc`` cannot be followed, if so."""
    if args.launcher not in (None, "none"):
        return (
            f"--nproc and --nnodes start the processes; with --launcher {args.launcher} they are "
            "started already. Leave out one of the two."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return (
            f"an outside launcher started {os.environ['WORLD_SIZE']} processes (WORLD_SIZE); give "
            "--launcher pytorch in place of --nproc and --nnodes"
        )
    return None


def words_of_rank(args: argparse.Namespace) -> list[str]:
    """The options of each rank: those of this command, less what starts processes."""
    words = [args.config]
    for option in args.plugin:
        words.append(f"--plugin={option}")
    given = {
        "--work-dir": args.work_dir, "--load-from": args.load_from, "--seed": args.seed,
        "--deepspeed": args.deepspeed, "--strategy": args.strategy, "--launcher": "pytorch",
    }  # fmt: skip
    words += [f"{name}={value}" for name, value in given.items() if value is not None]
    if args.resume is not None:
        words.append("--resume" if args.resume is True else f"--resume={args.resume}")
    if args.deterministic:
        words.append("--deterministic")
    if args.cfg_options:
        words += ["--cfg-options", *args.cfg_options]
    return words


def _config(args: argparse.Namespace) -> Config | None:
    """The checked config; None where it is refused, which the first of several processes says."""
    options = _options_of(args)
    number = next((os.environ[name] for name in _RANK_NAMES if name in os.environ), "0")
    if number == "0" or args.launcher in (None, "none"):
        return checked_config(args.config, args, options)
    with redirect_stderr(io.StringIO()):
        try:
            return checked_config(args.config, args, options)
        except ValueError as error:
            if getattr(error, "exit_code", None) != 2:
                raise
            return None


def _name_of(strategy: object) -> str:
    kind = strategy.get("type") if isinstance(strategy, dict) else strategy
    return str(getattr(kind, "__name__", getattr(kind, "name", kind))).rpartition(".")[2]


def _options_of(args: argparse.Namespace) -> list[str]:
    """The plain options as --cfg-options."""
    strategy = None
    if args.deepspeed is not None:
        strategy = {"type": "DeepSpeed", "config": args.deepspeed}
    elif args.strategy is not None:
        strategy = {"type": STRATEGIES[args.strategy]}
    given = {
        "work_dir": args.work_dir,
        "resume": args.resume,
        "load_from": args.load_from,
        "randomness.seed": args.seed,
        "randomness.deterministic": args.deterministic or None,
        "strategy": strategy,
        "launcher": args.launcher,
    }
    paths = ("work_dir", "load_from")
    return [
        f"{key}={str(Path(value)) if key in paths else value!r}"
        for key, value in given.items()
        if value is not None
    ]
