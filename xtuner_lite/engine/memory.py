"""Memory of a training step per device, for every strategy: each formula once.

P trained parameters, F frozen ones, N devices, c bytes of the compute dtype (2 for bf16 and fp16):

    strategy      weights           gradients   master   optimizer
    single, DDP   4 P + c F         4 P         -        S
    FSDP2         (4 P + c F) / N   4 P / N     -        S / N
    ZeRO-1        c (P + F)         c P         4 P / N  S / N
    ZeRO-2        c (P + F)         c P / N     4 P / N  S / N
    ZeRO-3        c (P + F) / N     c P / N     4 P / N  S / N

S is the optimizer's state, 8 P for Adam. The first two keep what trains in float32
(engine.precision), so their weights are the master weights. ZeRO-1 to 3 are the stages P_os, P_os+g
and P_os+g+p of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models" (arXiv 1910.02054, section 5); DeepSpeed keeps weights and gradients in the
compute dtype and a float32 partition of the weights. FSDP2: Zhao et al. 2023, "PyTorch FSDP" (arXiv
2304.11277), with torch's fully_shard on every layer and the rest as one unit. A quantised base
counts its own bytes in place of c F. Activations are those of one micro-batch, whatever N is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from xtuner_lite.models.memory import ActivationMemory
from xtuner_lite.registry import OPTIMIZERS

Placement = Literal[
    "single", "ddp", "fsdp2", "fsdp2_offload",
    "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload",
]  # fmt: skip
PLACEMENTS: tuple[Placement, ...] = Placement.__args__

#: DeepSpeed's defaults (deepspeed/runtime/zero/config.py), in elements.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000

_FLOAT32 = 4
_BNB_BLOCK, _BNB_SMALL = 256, 4096  # bitsandbytes: 8-bit in blocks of 256, from 4096 elements on


@dataclass(frozen=True)
class ModelSize:
    """What the formulas read of a model and its settings. Bytes where no unit is named."""

    trainable: int
    """Parameters that train."""
    frozen: int
    """Parameters that do not."""
    frozen_bytes: int
    """Of the frozen ones as they are stored: in the compute dtype or quantised."""
    compute_bytes: int
    """Bytes of a number in the compute dtype."""
    layer: int
    """Parameters of the largest decoder layer."""
    layer_trainable: int
    """Those of them that train."""
    outside: int
    """Parameters outside the decoder layers: embeddings, norms, head."""
    optimizer: int
    """The optimizer's state of all trained parameters."""
    update: int
    """What the optimizer makes for a moment on one device that updates all."""
    dequantized: int
    """The largest quantised weight in the compute dtype; 0 without quantisation."""
    activations: ActivationMemory
    """Of the placement; see computes_under_autocast."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device, and in the host's memory for it, by what they are for."""

    weights: int
    gradients: int
    master: int
    """Float32 weights beside weights in the compute dtype."""
    optimizer: int
    buffers: int
    """Weights gathered or cast for the computation, gradients on their way to other devices."""
    activations: int
    head: int
    """What head and loss add to the peak."""
    update: int
    """What the update adds to the peak, when activations are gone."""
    host: int
    """In the host's memory, for this device."""

    @property
    def total(self) -> int:
        """Bytes on the device at the peak; all but ``host``."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


def computes_under_autocast(placement: Placement) -> bool:
    """True: trained weights are float32 and cast when used; False: they have the compute dtype."""
    return placement in ("single", "ddp")


def device_memory(
    size: ModelSize,
    placement: Placement,
    devices: int,
    *,
    reduce_bucket: int = REDUCE_BUCKET,
    max_live_parameters: int = MAX_LIVE_PARAMETERS,
) -> DeviceMemory:
    """Memory of one of ``devices`` devices; see the module's table.

    Gradients are counted whole beside the activations, as from the second micro-batch of an
    accumulation on; with one micro-batch a step the peak is a little lower.

    Args:
        size: the model, with the activations of this placement.
        placement: strategy.
        devices: N; 'single' has one whatever N is.
        reduce_bucket: elements of ZeRO's gradient bucket.
        max_live_parameters: parameters that ZeRO-3 keeps gathered at most.

    Raises:
        ValueError: another placement, or no device.
    """
    if placement not in PLACEMENTS or devices < 1:
        raise ValueError(
            f"strategy {placement!r} on {devices} devices; strategies are {', '.join(PLACEMENTS)}, "
            "and devices count from 1"
        )
    if placement in ("single", "ddp"):
        return _replicated(size, 1 if placement == "single" else devices)
    if placement.startswith("fsdp2"):
        return _fsdp2(size, devices, offload=placement.endswith("offload"))
    return _zero(
        size, int(placement[4]), devices, placement.endswith("offload"), reduce_bucket,
        max_live_parameters,
    )  # fmt: skip


def _replicated(size: ModelSize, devices: int) -> DeviceMemory:
    """Every device has all; DDP's buckets hold every gradient once more (torch DDP's default)."""
    gradients = _FLOAT32 * size.trainable
    buckets = gradients if devices > 1 else 0
    return _with_activations(
        size,
        weights=_FLOAT32 * size.trainable + size.frozen_bytes,
        gradients=gradients,
        optimizer=size.optimizer,
        buffers=buckets,
        update=size.update,
    )


def _fsdp2(size: ModelSize, devices: int, *, offload: bool) -> DeviceMemory:
    """Shards; two layers (the next is fetched while one computes) and the root unit are gathered.

    In backward one layer's whole gradients wait in the compute dtype, and in float32 for the sum.
    """
    c = size.compute_bytes
    weights = _share(_FLOAT32 * size.trainable + size.frozen_bytes, devices)
    gradients = _share(_FLOAT32 * size.trainable, devices)
    optimizer = _share(size.optimizer, devices)
    gathered = c * (2 * size.layer + size.outside) + (c + _FLOAT32) * size.layer_trainable
    kept = dict(weights=weights, gradients=gradients, optimizer=optimizer)
    host = sum(kept.values()) if offload else 0
    return _with_activations(size, buffers=gathered, host=host, **({} if offload else kept))


def _zero(
    size: ModelSize,
    stage: int,
    devices: int,
    offload: bool,
    reduce_bucket: int,
    max_live: int,
) -> DeviceMemory:
    """DeepSpeed. The float32 gradients of the partition exist during the update only."""
    c = size.compute_bytes
    weights = c * size.trainable + size.frozen_bytes
    gradients = c * size.trainable
    partition = _share(size.trainable, devices)
    master, optimizer = _FLOAT32 * partition, _share(size.optimizer, devices)
    buffers = c * reduce_bucket
    if stage >= 2:
        gradients = c * partition
    if stage == 3:
        buffers += c * min(size.trainable + size.frozen, max_live)
        weights = _share(weights, devices)
    if not offload:
        return _with_activations(
            size, weights=weights, gradients=gradients, master=master, optimizer=optimizer,
            buffers=buffers, update=_FLOAT32 * partition,
        )  # fmt: skip
    # The updated partition is computed by the CPU, from float32 gradients kept there.
    host = master + optimizer + _FLOAT32 * partition + (weights if stage == 3 else 0)
    on_device = 0 if stage == 3 else weights
    return _with_activations(size, weights=on_device, buffers=buffers, host=host)


def _with_activations(
    size: ModelSize,
    *,
    weights: int = 0,
    gradients: int = 0,
    master: int = 0,
    optimizer: int = 0,
    buffers: int = 0,
    update: int = 0,
    host: int = 0,
) -> DeviceMemory:
    activations = size.activations
    return DeviceMemory(
        weights=weights,
        gradients=gradients,
        master=master,
        optimizer=optimizer,
        buffers=buffers + activations.copies + size.dequantized,
        activations=activations.saved + activations.recompute,
        head=max(0, activations.head - activations.recompute),
        update=max(0, update - activations.peak),
        host=host,
    )


def _share(number: int, devices: int) -> int:
    return -(-number // devices)


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
            total += times * moments * (count + _FLOAT32 * _share(count, _BNB_BLOCK))
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
