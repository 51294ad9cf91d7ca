"""In which dtype weights are stored under ZeRO, and whole tensors gathered from its shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xtuner_lite.engine.precision import Precision
from xtuner_lite.engine.strategies.deepspeed_zero import Share

#: Name of a parameter -> (start, stop, elements) of this rank's float32 weights.
Masters = Mapping[str, list[tuple[int, int, Tensor]]]


def choose_half_weights(
    model: nn.Module, wanted: bool | None, precision: Precision, *, stage: int
) -> bool:
    """Whether what trains is stored in bf16 too, beside float32 copies that ZeRO cuts.

    A full fine-tune would else hold each weight twice in float32; of an adapter that is little, and
    its small updates are not rounded.

    Raises:
        ValueError: it is wanted and the run does not compute in bf16.
    """
    if wanted and precision.dtype != torch.bfloat16:
        dtype = str(precision.dtype).removeprefix("torch.")
        raise ValueError(
            f"strategy.half_weights=True needs bf16, and optim_wrapper.dtype gives {dtype}; leave "
            "half_weights out, or set optim_wrapper.dtype='bf16'"
        )
    if wanted is not None:
        return wanted
    floating = [p for p in model.parameters() if p.is_floating_point()]
    trained = sum(p.numel() for p in floating if p.requires_grad)
    most_train = trained > sum(p.numel() for p in floating) / 2
    return most_train and stage > 1 and precision.dtype == torch.bfloat16


def store_weights(model: nn.Module, precision: Precision, *, half: bool) -> None:
    """Cast the weights in place: as ``precision`` says, or all that is floating to its dtype."""
    precision.prepare(model)
    if half:
        precision.reason += "; trained weights too, beside float32 copies (half_weights)"
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(precision.dtype)


def masters_of(shares: Iterable[Share]) -> Masters:
    """This rank's float32 weights by parameter."""
    found: dict[str, list[tuple[int, int, Tensor]]] = {}
    for share in shares:
        for part in share.slices:
            entry = (part.start, part.stop, part.of(share.flat.detach()))
            found.setdefault(part.name, []).append(entry)
    return found


def gather_tensor(
    tensor: Tensor,
    parts: list[tuple[int, int, Tensor]] | None,
    *,
    device: torch.device,
    is_main: bool,
    world_size: int,
) -> Tensor | None:
    """The whole tensor in CPU memory on the main rank, None on the others; a collective.

    Args:
        tensor: of the model's state; where it trains, only its shape is used.
        parts: this rank's float32 elements of it; None: it does not train.
        device: on which ranks exchange tensors.
    """
    if parts is not None:
        shape = getattr(tensor, "ds_shape", tensor.shape)
        whole = torch.zeros(math.prod(shape), dtype=torch.float32, device=device)
        for start, stop, elements in parts:
            whole[start:stop] = elements
        if world_size > 1:
            dist.reduce(whole, dst=0)
        return whole.view(shape).cpu() if is_main else None
    if hasattr(tensor, "ds_id"):  # cut by stage 3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone() if is_main else None
    return tensor.detach().cpu() if is_main else None


def whole_tensors(
    state: Mapping[str, Tensor],
    names: Iterable[str],
    masters: Masters,
    trained: Mapping[int, str],
    **where: object,
) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor or None) one by one; see gather_tensor.

    Args:
        state: ``model.state_dict(keep_vars=True)``.
        names: of tensors in it, the same on every rank.
        masters: see masters_of.
        trained: id of each trained parameter -> its name in ``masters``.
    """
    for name in names:
        if name in state:
            own = trained.get(id(state[name]))
            parts = None if own is None else masters.get(own, [])
            yield name, gather_tensor(state[name], parts, **where)
