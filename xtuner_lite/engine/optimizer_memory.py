"""Bytes that an optimizer keeps, and makes for a moment, from the shapes of what trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from xtuner_lite.registry import OPTIMIZERS

_FLOAT32 = 4
_BNB_BLOCK, _BNB_SMALL = 256, 4096  # bitsandbytes: 8-bit in blocks of 256, from 4096 elements on


def optimizer_state_bytes(parameters: Iterable[torch.Tensor], optimizer: dict[str, Any]) -> int:
    """Bytes of an optimizer's state for trained parameters.

    The optimizer itself makes its state, on fake tensors. bitsandbytes' optimizers, whose kernels
    know no fake tensor, are counted by their rule: 8-bit moments with a float32 scale for every
    256, float32 for parameters below 4096 elements.

    Args:
        parameters: only shapes are read; all count as float32.
        optimizer: the config's optim_wrapper.optimizer.

    Raises:
        ValueError: the optimizer makes no state that can be counted.
    """
    shapes = Counter(tuple(p.shape) for p in parameters)
    kind = OPTIMIZERS.resolve(optimizer["type"])
    if kind.__module__.startswith("bitsandbytes."):
        return _bitsandbytes_bytes(kind, shapes, optimizer)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fakes = {shape: nn.Parameter(torch.empty(shape)) for shape in shapes}
        for fake in fakes.values():
            fake.grad = torch.empty_like(fake)
        built = OPTIMIZERS.build({**optimizer, "params": list(fakes.values())})
        try:
            built.step()
        except Exception as error:
            if any(not built.state[p] for p in fakes.values()):  # it made no state before it failed
                raise ValueError(
                    f"the state of {kind.__name__} cannot be counted ({error}); name a torch "
                    "optimizer for the estimate: --cfg-options optim_wrapper.optimizer.type=AdamW"
                ) from error
        total = 0
        for shape, fake in fakes.items():
            tensors = [v for v in built.state[fake].values() if isinstance(v, torch.Tensor)]
            total += shapes[shape] * sum(v.numel() * v.element_size() for v in tensors)
        return total


def _bitsandbytes_bytes(
    kind: Any, shapes: Counter[tuple[int, ...]], optimizer: dict[str, Any]
) -> int:
    from bitsandbytes.optim.optimizer import Optimizer2State

    moments = 2 if issubclass(kind, Optimizer2State) else 1
    is_8bit = "8bit" in kind.__name__ or optimizer.get("optim_bits") == 8
    total = 0
    for shape, times in shapes.items():
        count = torch.Size(shape).numel()
        if is_8bit and count >= _BNB_SMALL:
            total += times * moments * (count + _FLOAT32 * -(-count // _BNB_BLOCK))
        else:
            total += times * moments * _FLOAT32 * count
    return total


def update_bytes(optimizer: dict[str, Any], trainable: int, device_type: str) -> int:
    """What torch's Adam makes during an update: on a GPU one float32 for every parameter.

    There the default is the "foreach" form, which takes the square roots of all second moments at
    once (torch.optim.adam._multi_tensor_adam); fused=True and foreach=False make nothing of it.
    """
    kind = OPTIMIZERS.resolve(optimizer["type"])
    is_foreach = optimizer.get("foreach") is not False and not optimizer.get("fused")
    is_adam = kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
    return _FLOAT32 * trainable if device_type == "cuda" and is_foreach and is_adam else 0
