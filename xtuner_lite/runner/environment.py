"""Process settings of a run, what it runs on, and compiling of layers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xtuner_lite.engine.distributed import DEFAULT_SLOW_TIMEOUT_S, DEFAULT_TIMEOUT_S
from xtuner_lite.engine.strategies.fsdp2_sharding import repeated_layers
from xtuner_lite.version import __version__

if TYPE_CHECKING:
    from xtuner_lite.runner.runner import Runner

_STACK = ("torch", "transformers", "peft", "datasets", "mmengine", "bitsandbytes")


def apply_env(
    *,
    num_threads: int | None = None,
    cudnn_benchmark: bool = False,
    mp_cfg: dict[str, Any] | None = None,
    dist_cfg: dict[str, Any] | None = None,
) -> None:
    """Apply the ``env_cfg`` section.

    Args:
        num_threads: CPU threads of torch; None leaves torch's choice (all cores). Results on the
            CPU
            repeat bit for bit only at a fixed number.
        cudnn_benchmark: let cuDNN try its algorithms; for fixed shapes.
        mp_cfg: dict(mp_start_method='fork' | 'spawn' | 'forkserver') of the reading processes.
        dist_cfg: dict(backend=None, timeout=300, slow_timeout=7200), for a run of several
            processes. timeout: seconds without progress on any rank after which the run ends,
            naming the rank that stayed behind; slow_timeout: the same while models load, data is
            prepared and checkpoints are written.
    """
    del dist_cfg  # read by the Runner, see ``timeouts``
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    method = (mp_cfg or {}).get("mp_start_method")
    if method is not None:
        torch.multiprocessing.set_start_method(method, force=True)


def timeouts(env_cfg: dict[str, Any] | None) -> dict[str, float]:
    """The time-outs of ``env_cfg.dist_cfg``, seconds: {'timeout_s': ..., 'slow_timeout_s': ...}.

    Raises:
        ValueError: one is not positive.
    """
    given = dict((env_cfg or {}).get("dist_cfg") or {})
    values = {
        "timeout_s": float(given.get("timeout", DEFAULT_TIMEOUT_S)),
        "slow_timeout_s": float(given.get("slow_timeout", DEFAULT_SLOW_TIMEOUT_S)),
    }
    if min(values.values()) <= 0:
        raise ValueError(f"env_cfg.dist_cfg: time-outs must be above 0 seconds, got {given}")
    return values


def describe_environment(runner: Runner) -> str:
    """A few lines for the top of a log: versions, device, threads, seed."""
    versions = []
    for name in _STACK:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed")
    device = runner.strategy.device
    place = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "CPU"
    )
    return "\n".join(
        [
            f"xtuner_lite {__version__}, Python {platform.python_version()}, {', '.join(versions)}",
            f"device {device} ({place}), {torch.get_num_threads()} threads, {runner.world_size} "
            "process(es)",
            f"seed {runner.seed}, work_dir {runner.work_dir}, logs {runner.log_dir}",
        ]
    )


def compile_layers(model: nn.Module, **options: Any) -> int:
    """Compile each repeated layer of the language models in ``model``; returns how many.

    Layer by layer compiles one layer's code and uses it for all, which keeps the warm-up short.

    Raises:
        ValueError: no module of ``model`` says which of its layers repeat.
    """
    layers = repeated_layers(model)
    if not layers:
        raise ValueError("compile=True found no repeated layers in this model; set compile=False")
    for layer in layers:
        layer.compile(**options)
    return len(layers)
