"""An adapter on a model without weights: whether it fits, and what its tensors are called."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xtuner_lite.export.publish import ExportError
from xtuner_lite.export.tensor_files import WeightFiles

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

PREFIX = "base_model.model."


def adapter_on(empty: PreTrainedModel, config: PeftConfig, adapter: WeightFiles) -> PeftModel:
    """The empty model with the adapter's layers, their weights empty too; checks that they fit.

    Raises:
        ExportError: names or shapes of the adapter's tensors differ from what the model needs.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    model = copy.deepcopy(empty)
    _resize(model, adapter)
    plain = copy.deepcopy(config)
    if hasattr(plain, "init_lora_weights"):
        plain.init_lora_weights = True  # others compute with weights that are not here
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about initial values and ties, which are not used
            adapted = get_peft_model(model, plain, low_cpu_mem_usage=True)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        raise ExportError(
            f"the adapter does not fit {type(empty).__name__}: {str(error).strip()} Give the base "
            f"model it was trained on ({config.base_model_name_or_path!r} by its own account)"
        ) from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = adapter.infos
    parameters = {PREFIX + name for name, _ in empty.named_parameters(remove_duplicate=False)}
    problems = [f"it lacks {name}" for name in sorted(set(expected) - set(found))]
    problems += [
        f"it has {name} besides"
        for name in sorted(set(found) - set(expected))
        if name.replace(".base_layer.", ".") not in parameters
    ]
    problems += [
        f"{name} is {list(found[name].shape)} there and {list(tensor.shape)} by the model"
        for name, tensor in sorted(expected.items())
        if name in found and tuple(tensor.shape) != found[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ExportError(
            f"the adapter does not belong to this base model: {'; '.join(problems[:3])}{more}. It "
            f"was trained on {config.base_model_name_or_path!r} by its own account; give that"
        )
    return adapted


def _resize(model: PreTrainedModel, adapter: WeightFiles) -> None:
    """Gives the model the adapter's number of tokens where it holds all embeddings itself."""
    name = PREFIX + weight_name(model, model.get_input_embeddings())
    info = adapter.infos.get(name)
    rows = model.get_input_embeddings().weight.shape[0]
    if info is not None and info.shape[0] != rows:
        model.resize_token_embeddings(info.shape[0], mean_resizing=False)


def assign_adapter(adapted: PeftModel, read: Callable[[str], Tensor]) -> None:
    """Gives every empty tensor of an adapter its value.

    peft's own loader would move them to their base layer, which is on the meta device.

    Args:
        adapted: the model with the adapter.
        read: a tensor of the adapter's file by its name there.
    """
    from peft import get_peft_model_state_dict

    own = adapted.state_dict(keep_vars=True)
    saved = get_peft_model_state_dict(adapted, state_dict=own, save_embedding_layers=False)
    keys = {id(tensor): key for key, tensor in saved.items()}
    for module in adapted.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in keys:
                value = read(keys[id(parameter)]).float()
                module._parameters[name] = nn.Parameter(value, requires_grad=False)


def weight_name(model: nn.Module, module: nn.Module | None) -> str:
    for name, other in model.named_modules():
        if module is not None and other is module:
            return f"{name}.weight"
    return ""
