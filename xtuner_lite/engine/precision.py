"""Numeric precision: what is stored in which dtype, autocast, and the fp16 loss scaler.

The rule: what trains is stored in float32, what is frozen is stored in the compute dtype, and the
forward pass runs under autocast. So a LoRA weight never loses a small update to rounding, and a
frozen base costs two bytes a parameter.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from xtuner_lite.engine import cpu_bf16
from xtuner_lite.structures import DTYPE_NAMES

DTYPES = {
    name: getattr(torch, long) for short, long in DTYPE_NAMES.items() for name in (short, long)
}


def choose_dtype(device_type: str) -> tuple[str, str]:
    """(dtype name, reason): the fastest dtype that this device computes natively.

    A dtype that a device only emulates is many times slower: on a CPU without AVX512-BF16 or AMX,
    bf16 matrix products run at a tenth of float32's speed or less.
    """
    if device_type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes bf16"
        return "fp16", "this GPU has no bf16; fp16 with loss scaling"
    if _cpu_computes_bf16():
        return "bf16", "this CPU computes bf16 (AVX512-BF16 or AMX)"
    return "fp32", "this CPU has no bf16 instructions"


def _cpu_computes_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def emulates_bf16(device_type: str) -> bool:
    """Whether this device is an x86 CPU on which torch emulates bf16 products.

    The two questions above are about x86 alone; other CPUs are left as they are.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return device_type == "cpu" and is_x86 and not _cpu_computes_bf16()


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a config's name ('bf16', 'fp16', 'fp32' or the long forms).

    Raises:
        ValueError: another name.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"dtype {name!r} is not known; allowed: auto, {', '.join(DTYPES)}. Set "
            "optim_wrapper.dtype."
        )
    return DTYPES[name]


class Precision:
    """Holds the compute dtype of a run and does the casts that go with it.

    Args:
        dtype: 'bf16', 'fp16' or 'fp32' (see parse_dtype), or 'auto' (see choose_dtype).
        device_type: 'cpu' or 'cuda'.
        loss_scale: fp16 only; 'dynamic' or a fixed number.
    """

    def __init__(
        self,
        dtype: str | torch.dtype = "auto",
        device_type: str = "cpu",
        *,
        loss_scale: str | float = "dynamic",
    ) -> None:
        self.reason = "set by the config"
        if dtype == "auto":
            dtype, self.reason = choose_dtype(device_type)
        self.dtype = parse_dtype(dtype)
        self.device_type = device_type
        self._float32_products = self.dtype == torch.bfloat16 and emulates_bf16(device_type)
        if self._float32_products:
            self.reason += "; bf16 products are computed in float32, this CPU only emulates bf16"
        self.scaler: torch.amp.GradScaler | None = None
        if self.dtype == torch.float16:
            fixed = None if loss_scale == "dynamic" else float(loss_scale)
            self.scaler = torch.amp.GradScaler(
                device_type,
                init_scale=fixed or 2.0**16,
                growth_interval=2000 if fixed is None else 2**31 - 1,
            )

    def prepare(self, module: nn.Module) -> None:
        """Store what trains in float32 and what is frozen, if floating point, in the compute dtype.

        Quantised (integer) parameters and all buffers stay as they are: rotary tables need float32.
        """
        for parameter in module.parameters():
            if not parameter.is_floating_point():
                continue
            wanted = torch.float32 if parameter.requires_grad else self.dtype
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)

    def autocast(self) -> AbstractContextManager:
        """The context in which a forward pass runs."""
        if self.dtype == torch.float32:
            return nullcontext()
        if self._float32_products:
            cpu_bf16.enable()
        return torch.autocast(self.device_type, dtype=self.dtype)
