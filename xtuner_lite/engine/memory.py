"""Memory of a training step per device, for every strategy: each formula once.

P trained parameters, F frozen ones, N devices, c bytes of the compute dtype (2 for bf16 and fp16):

    strategy           weights          gradients  master   optimizer
    single, DDP        4 P + c F        4 P        -        S
    FSDP2              (4 P + c F) / N  4 P / N    -        S / N
    ZeRO-1             4 P + c F        4 P        4 P / N  S / N
    ZeRO-2             4 P + c F        4 P / N    4 P / N  S / N
    ZeRO-3             (4 P + c F) / N  4 P / N    4 P / N  S / N
    ZeRO-2, -3, half   2 P in the place of 4 P of weights

S is the optimizer's state, 8 P for Adam. What trains is kept in float32 (engine.precision), so the
weights are the master weights, except where half_weights of the DeepSpeed strategy holds: bf16, and
more than half of the parameters train. DeepSpeed cuts a float32 copy over the ranks in any case,
and sums gradients in float32. ZeRO-1 to 3 are the stages P_os, P_os+g and P_os+g+p of Rajbhandari
et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv
1910.02054, section 5). FSDP2: Zhao et al. 2023, "PyTorch FSDP" (arXiv 2304.11277), with torch's
fully_shard on every layer and the rest as one unit. A quantised base counts its own bytes in place
of c F. Activations are those of one micro-batch, whatever N is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from xtuner_lite.models.memory import ActivationMemory

Placement = Literal[
    "single", "ddp", "fsdp2", "fsdp2_offload",
    "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload",
]  # fmt: skip
PLACEMENTS: tuple[Placement, ...] = Placement.__args__

#: Elements: reduce_bucket_size of our presets, and DeepSpeed's default of the other, which they
#: leave (deepspeed/runtime/zero/config.py).
REDUCE_BUCKET = 50_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000

_FLOAT32 = 4


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
    half_weights: bool
    """Whether what trains is stored in bf16; see keeps_half_weights."""
    accumulates: bool
    """Whether a step has several micro-batches."""
    optimizer: int
    """The optimizer's state of all trained parameters."""
    update: int
    """What the optimizer makes for a moment on one device that updates all."""
    dequantized: int
    """The largest quantised weight in the compute dtype; 0 without quantisation."""
    activations: ActivationMemory
    """Under the dtypes of the placement; see computes_under_autocast."""


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


def keeps_half_weights(
    placement: Placement, trainable: int, frozen: int, dtype: str, wanted: bool | None = None
) -> bool:
    """Whether trained weights are stored in bf16, as engine.strategies.deepspeed decides it.

    Args:
        placement: strategy.
        trainable, frozen: numbers of parameters; quantised ones are left out.
        dtype: compute dtype.
        wanted: its option half_weights; None leaves it to the rule.
    """
    if not placement.startswith(("zero2", "zero3")) or dtype != "bf16":
        return False
    return trainable > frozen if wanted is None else wanted


def shards_weights(placement: Placement) -> bool:
    """Whether the weights themselves are cut, which a quantised base does not allow."""
    return placement.startswith(("fsdp2", "zero3"))


def computes_under_autocast(placement: Placement, half_weights: bool) -> bool:
    """True: what trains is float32 where it is used, and cast; False: it has the compute dtype."""
    return not placement.startswith("fsdp2") and not half_weights


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
    Where at most a tenth trains, gradients are summed once a step, and whole until then (our
    FSDP2's reduce_each_micro_batch).
    """
    c = size.compute_bytes
    weights = _share(_FLOAT32 * size.trainable + size.frozen_bytes, devices)
    gradients = _share(_FLOAT32 * size.trainable, devices)
    optimizer = _share(size.optimizer, devices)
    gathered = c * (2 * size.layer + size.outside) + (c + _FLOAT32) * size.layer_trainable
    trains_little = 10 * size.trainable <= size.trainable + size.frozen
    if trains_little and size.accumulates:
        gathered += _FLOAT32 * size.trainable
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
    """DeepSpeed. One layer's gradients wait for their bucket; the update flattens its partition."""
    stored = 2 if size.half_weights else _FLOAT32
    whole = stored * size.trainable + size.frozen_bytes
    partition = _share(size.trainable, devices)
    gradients = _FLOAT32 * (size.trainable if stage == 1 else partition)
    master, optimizer = _FLOAT32 * partition, _share(size.optimizer, devices)
    buffers = stored * (reduce_bucket + (size.layer_trainable if stage > 1 else 0))
    weights = whole
    if stage == 3:
        parameters = size.trainable + size.frozen
        buffers += whole * min(parameters, max_live) // parameters
        weights = _share(whole, devices)
    if not offload:
        return _with_activations(
            size, weights=weights, gradients=gradients, master=master, optimizer=optimizer,
            buffers=buffers, update=_FLOAT32 * partition,
        )  # fmt: skip
    # The updated partition is computed by the CPU, from float32 gradients kept there.
    host = master + optimizer + gradients + (weights if stage == 3 else 0)
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
