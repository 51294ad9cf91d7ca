"""Numeric precision: what is stored in which dtype, autocast, and the fp16 loss scaler.

The rule: what trains is stored in float32, what is frozen is stored in the compute dtype, and the
forward pass runs under autocast. So a LoRA weight never loses a small update to rounding, and a
frozen base costs two bytes a parameter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a config's name ('bf16', 'fp16', 'fp32' or the long forms).

    Raises:
        ValueError: another name.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not known; allowed: {', '.join(DTYPES)}. Set optim_wrapper.dtype.")
    return DTYPES[name]


class Precision:
    """Holds the compute dtype of a run and does the casts that go with it.

    Args:
        dtype: 'bf16', 'fp16' or 'fp32' (see parse_dtype).
        device_type: 'cpu' or 'cuda'.
        loss_scale: fp16 only; 'dynamic' or a fixed number.
    """

    def __init__(
        self, dtype: str | torch.dtype = "bf16", device_type: str = "cpu", *, loss_scale: str | float = "dynamic"
    ) -> None:
        self.dtype = parse_dtype(dtype)
        self.device_type = device_type
        self.scaler: torch.amp.GradScaler | None = None
        if self.dtype == torch.float16:
            fixed = None if loss_scale == "dynamic" else float(loss_scale)
            self.scaler = torch.amp.GradScaler(
                device_type, init_scale=fixed or 2.0**16, growth_interval=2000 if fixed is None else 2**31 - 1
            )

    def prepare(self, module: nn.Module) -> None:
        """Store trainable parameters in float32 and frozen floating-point ones in the compute dtype.

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
        return torch.autocast(self.device_type, dtype=self.dtype)
