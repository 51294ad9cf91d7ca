"""A model whose weights are read from disk for each layer as it runs, and dropped behind it.

Slow (every forward pass reads the whole model) and small: the memory of one layer. It is how a
merge of a model larger than memory is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build_empty(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of a config: parameters on the meta device, buffers computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def stream_weights(
    model: nn.Module, read: Callable[[str], Tensor | None], *, dtype: torch.dtype = torch.float32
) -> None:
    """Makes ``model`` fetch its meta parameters as it runs.

    A decoder layer, or a module with an adapter, is fetched as a whole (an adapter may look at its
    base layer's weight without running it), any other module by itself. Parameters that are not on
    the meta device stay.

    Args:
        model: its parameters' names are given to ``read``.
        read: the tensor of a parameter; None where it has none of that name.
        dtype: the parameters are cast to it.
    """
    inside: set[int] = set()
    blocks = _blocks(model)
    for prefix, unit in model.named_modules():
        if id(unit) in inside:
            continue
        whole = (
            id(unit) in blocks or hasattr(unit, "base_layer") or hasattr(unit, "original_module")
        )
        if whole:
            inside |= {id(m) for m in unit.modules()}
        places = [
            (owner, key, ".".join(part for part in (prefix, name, key) if part))
            for name, owner in (unit.named_modules() if whole else [("", unit)])
            for key, parameter in owner._parameters.items()
            if parameter is not None and parameter.is_meta
        ]
        if places:
            _hook(unit, places, read, dtype)


def _hook(unit: nn.Module, places: list, read: Callable, dtype: torch.dtype) -> None:
    empty = {(id(owner), key): owner._parameters[key] for owner, key, _ in places}

    def fetch(*_: Any) -> None:
        for owner, key, name in places:
            tensor = read(name)
            if tensor is None:
                raise KeyError(f"no tensor {name} on disk")
            owner._parameters[key] = nn.Parameter(tensor.to(dtype), requires_grad=False)

    def drop(*_: Any) -> None:
        for owner, key, _ in places:
            owner._parameters[key] = empty[id(owner), key]

    unit.register_forward_pre_hook(fetch, with_kwargs=True)
    unit.register_forward_hook(drop, with_kwargs=True)


def _blocks(model: nn.Module) -> set[int]:
    """id of each decoder layer: the entries of the longest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return {id(layer) for layer in max(lists, key=len)} if lists else set()
