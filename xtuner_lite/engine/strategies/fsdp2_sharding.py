"""Where fully_shard (FSDP2) cuts a training method: each repeated layer, and the method itself.

The method itself is the outermost unit, not the language model in it: methods call the decoder and
the head themselves, so the model's own forward, where the outer unit gathers what belongs to no
layer (embeddings, final norm, head), never runs.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils import _pytree

from xtuner_lite.engine.distributed import Ranks
from xtuner_lite.structures import LossOutput

#: What trains, as a share of the model, up to which whole gradients are kept between micro-batches.
_SMALL_SHARE = 0.1


def original_class(module: nn.Module) -> type:
    """The class of ``module`` as it was written: fully_shard puts a subclass in its place."""
    # [FSDP<Name>, FSDPModule, Name, ...]; torch itself reads the class from this place.
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that the models inside ``model`` say must not be split, innermost first."""
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    return [m for m in reversed(list(model.modules())) if original_class(m).__name__ in names]


def make_mesh(device_type: str, ranks: Ranks) -> DeviceMesh:
    """All processes in one row; a process that no launcher started gets a group of its own."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device_type, (ranks.world_size,))


def refuse_unshardable(model: nn.Module) -> None:
    """Raises ValueError where a parameter is quantised: its numbers are no rows of a matrix."""
    quantised = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if quantised:
        raise ValueError(
            f"strategy FSDP2 cannot shard a quantised base model ({quantised[0]} and "
            f"{len(quantised) - 1} more): bitsandbytes keeps packed blocks whose scales stand "
            "beside them, and rows cut out of them mean nothing. Use strategy DDP (each GPU holds "
            "the 4-bit base), or load the model without quantization."
        )


def trains_little(model: nn.Module) -> bool:
    """Whether what trains is small beside the model, as an adapter is."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains) <= _SMALL_SHARE * sum(n for n, _ in sizes)


def shard_method(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    reshard_after_forward: bool | int,
    cpu_offload: bool,
) -> None:
    """Cut every parameter of ``model`` into rows over the ranks of ``mesh``, in place.

    Names stay. What trains is stored in float32 and gathered in ``dtype``, so that autocast finds
    nothing to convert: it would keep a converted copy of every layer until the end of the forward
    pass. Gradients are summed over the ranks in float32; see docs/decisions.

    Args:
        model: on any device; each layer passes through the mesh's device when it is cut.
        dtype: compute dtype.
        reshard_after_forward: see FSDP2.
        cpu_offload: see FSDP2.
    """
    on_gpu = mesh.device_type == "cuda"
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)
        if dtype == torch.float32
        else MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            # Loss weights are inputs too; autocast casts what products need.
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy(),
    }
    layers = repeated_layers(model)
    if not layers:
        warnings.warn(
            f"FSDP2 finds no repeated layer in {type(model).__name__}: no module names one in "
            "_no_split_modules. Each rank gathers the whole model for a forward pass.",
            stacklevel=2,
        )
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    _make_traversable()
    # None: gathered until the backward pass, which begins with the head.
    fully_shard(model, reshard_after_forward=None, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum over the ranks, not a mean; by plain SUM, the only one that gloo knows.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _make_traversable() -> None:
    """Let fully_shard find the loss in a LossOutput, to know when the backward pass begins."""
    if LossOutput not in _pytree.SUPPORTED_NODES:
        _pytree.register_pytree_node(
            LossOutput,
            lambda output: ([output.loss_sum, output.num_units, output.metrics], None),
            lambda values, _: LossOutput(*values),
        )
