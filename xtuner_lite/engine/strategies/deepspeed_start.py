"""What DeepSpeed needs before it runs: its import, a process group, an optimizer it can cut."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.logging import print_log
from torch.optim import Optimizer

from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.engine.optim import OptimWrapper

#: The strategy reads DeepSpeed's insides, which change between minor versions.
OLDEST = (0, 19)

#: A build of CPUAdam takes about a minute; a lock file older than this was left behind.
_BUILD_LIMIT_S = 1800.0

#: Optimizers whose update of an element depends on that element alone. ZeRO hands an optimizer
#: flat pieces of many parameters: one that looks at rows or blocks would compute something else.
ELEMENTWISE = {
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta", "ASGD", "Rprop",
    "Lion", "DeepSpeedCPUAdam", "FusedAdam",
}  # fmt: skip


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, set to ``device`` and quiet.

    Raises:
        ImportError: it is not installed, or too old.
        RuntimeError: it was already set to another kind of device.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "strategy DeepSpeed needs the package deepspeed, which is not installed. Install it "
            "with `pip install 'deepspeed>=0.19'`, or use strategy FSDP2, which needs nothing."
        )
    if device.type == "cpu" and "deepspeed" not in sys.modules:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    version = tuple(int(part) for part in deepspeed.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(
            f"strategy DeepSpeed needs deepspeed {'.'.join(map(str, OLDEST))} or newer, "
            f"{deepspeed.__version__} is installed; run `pip install -U deepspeed`"
        )
    found = deepspeed.get_accelerator().device_name()
    if found != device.type:
        raise RuntimeError(
            f"DeepSpeed is set to device {found!r} (variable DS_ACCELERATOR), the strategy to "
            f"{device.type!r}. Unset DS_ACCELERATOR, or set strategy.device."
        )
    # Its shared-memory collectives for CPUs take a minute to compile, and a rank that died leaves
    # the others spinning; gloo notices it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def ensure_process_group(ranks: Ranks) -> bool:
    """Make a process group of this one process where there is none; True if it was made here."""
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed asks for it
    if dist.is_initialized():
        return False
    assert ranks.world_size == 1, "the launcher of several ranks makes their group"
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True


def check_optimizer(optimizer: Optimizer, *, allow_untested: bool, source: str) -> None:
    """Refuse an optimizer that does not work on flat pieces.

    Raises:
        ValueError: it is not known to, and the DeepSpeed config does not allow it expressly.
    """
    name = type(optimizer).__name__
    if name not in ELEMENTWISE and not allow_untested:
        raise ValueError(
            f"optimizer {name} is not known to work under ZeRO, which cuts weights into flat "
            "pieces: an optimizer that looks at rows, matrices or blocks of a weight would compute "
            f"something else. Use one of {', '.join(sorted(ELEMENTWISE))}, or, if it treats each "
            f"element by itself, set zero_allow_untested_optimizer: true in {source}."
        )


def use_cpu_adam(optim_wrapper: OptimWrapper, ranks: Ranks) -> None:
    """Put DeepSpeed's CPUAdam in the place of Adam or AdamW; other optimizers stay.

    It is compiled when it is first used; one rank of each machine begins.

    Raises:
        RuntimeError: it cannot be built here.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = optim_wrapper.optimizer
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    if any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            "DeepSpeed's CPUAdam knows neither amsgrad nor maximize; take them out of "
            "optim_wrapper.optimizer, or set strategy.cpu_adam=False"
        )
    if ranks.is_main:
        print_log(
            "the optimizer runs on the CPU with DeepSpeed's CPUAdam; at its first use on a machine "
            "it is compiled, which takes about a minute",
            logger="current",
        )
    _refuse_stale_lock()
    defaults = optimizer.defaults
    options = {key: defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    error = None
    with ranks.local_main_first():
        try:
            optim_wrapper.optimizer = DeepSpeedCPUAdam(
                optimizer.param_groups,
                adamw_mode=type(optimizer) is torch.optim.AdamW,
                **{key: _number(value) for key, value in options.items()},
            )
        except RuntimeError as caught:
            error = caught
    if error is not None:
        raise RuntimeError(
            f"DeepSpeed's CPUAdam cannot be built here: {error.__cause__ or error}. It needs a C++ "
            "compiler and ninja (`apt install g++`, `pip install ninja`); or set "
            "strategy.cpu_adam=False to update the weights with torch's optimizer on the CPU, "
            "which is several times slower."
        ) from error


def _refuse_stale_lock() -> None:
    """torch waits for ever for a build whose lock file a killed process left."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/cpu_adam/lock"):
        age_s = time.time() - lock.stat().st_mtime
        if age_s > _BUILD_LIMIT_S:
            raise RuntimeError(
                f"DeepSpeed's CPUAdam cannot be built: {lock} is {age_s / 60:.0f} minutes old, "
                "left by a process that was killed while it compiled. Delete the file and start "
                "again."
            )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
