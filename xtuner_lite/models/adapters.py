"""Adapters: any peft config on a causal language model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xtuner_lite.models.new_tokens import train_new_rows

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

#: Adapter types that cannot be trained here, by peft's name for them, and why.
REFUSED = {
    "ADALORA": (
        "its rank schedule and its orthogonality term run inside peft's own training step, and "
        "training it without them is not AdaLoRA"
    ),
    "ADAMSS": "its subspaces are chosen by a callback of another trainer",
    "ADAPTION_PROMPT": "it replaces the attention layers, which packed samples need",
    "POLY": "each batch would have to say which task it belongs to (task_ids)",
    "SHADOW": "what passes between its layers is not the hidden states that the loss is made of",
    "XLORA": "it mixes adapters that are trained already",
}
#: Ways to start LoRA that look at data before the training.
_NEEDS_DATA = ("corda", "eva", "lora_ga")


def add_adapter(
    model: PreTrainedModel,
    config: PeftConfig | dict[str, Any],
    *,
    new_token_ids: Sequence[int] = (),
    for_training: bool = True,
) -> PeftModel:
    """The model with an adapter: its own weights frozen, what trains in float32.

    Args:
        model: the base model.
        config: a peft config, or ``dict(type=LoraConfig, r=16, ...)``. Without target_modules the
            adapter goes on every linear layer except the head.
        new_token_ids: tokens whose rows in the embeddings are trained and saved with the adapter.
        for_training: refuse the types that cannot be trained here, though they can be used.

    Raises:
        ImportError: peft is not installed.
        TypeError: the config is neither of the two.
        ValueError: target_modules names no module of this model; the adapter type cannot be
            trained here, with the reason; or it cannot train the rows of new tokens.
    """
    from peft import get_peft_model

    config = build_peft_config(config)
    if for_training or config.is_prompt_learning:
        check_trainable_type(config)
    train_new_rows(model, config, new_token_ids)
    names = [getattr(config, key, None) for key in ("target_modules", "target_parameters")]
    if hasattr(config, "target_modules") and not any(names):
        config.target_modules = "all-linear"
    if hasattr(model, "prepare_inputs_for_generation"):  # not a vision tower by itself
        config.task_type = config.task_type or "CAUSAL_LM"
    try:
        with warnings.catch_warnings():  # peft asks transformers by a name it is about to drop
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            adapted = get_peft_model(model, config)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        leaves = sorted({n.rsplit(".")[-1] for n, m in model.named_modules() if _is_linear(m)})
        raise ValueError(
            f"the adapter does not fit {type(model).__name__}: {error} Its linear layers, for "
            f"target_modules: {', '.join(leaves)}"
        ) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def build_peft_config(config: PeftConfig | dict[str, Any]) -> PeftConfig:
    """The peft config itself, a copy of one, or the one a ``dict(type=..., ...)`` describes.

    Raises:
        TypeError: it is neither, or its type is no peft config class.
    """
    import copy

    import peft

    if isinstance(config, dict) and "type" in config:
        settings = dict(config)
        kind = settings.pop("type")
        if isinstance(kind, str):
            kind = getattr(peft, kind.removeprefix("peft."), kind)
        config = kind(**settings) if callable(kind) else kind
    if not isinstance(config, peft.PeftConfig):
        known = sorted(
            name
            for name, value in vars(peft).items()
            if isinstance(value, type) and issubclass(value, peft.PeftConfig)
        )
        raise TypeError(
            f"lora is {config!r}, which is no peft config; write lora=dict(type=LoraConfig, r=16); "
            f"known types: {', '.join(known)}"
        )
    return copy.deepcopy(config)  # peft fills in fields; the caller's object stays as it was


def check_trainable_type(config: PeftConfig) -> None:
    """Raises ValueError, with the reason, for an adapter type that cannot be trained here."""
    name, kind = type(config).__name__, str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        why = "it puts virtual tokens before a prompt, and packed samples leave no place for them"
    elif kind in REFUSED:
        why = REFUSED[kind]
    elif getattr(config, "init_lora_weights", True) in _NEEDS_DATA:
        how = config.init_lora_weights
        raise ValueError(
            f"lora starts from init_lora_weights={how!r}, which looks at data before the training "
            "begins; take 'pissa', 'olora' or 'orthogonal', which do not, or leave it out"
        )
    else:
        return
    raise ValueError(
        f"lora is a {name}: {why}. Use an adapter inside layers, such as LoraConfig; "
        "docs/howto/tuning_methods.md lists those that are tested"
    )


@contextmanager
def without_input_casts(model: nn.Module) -> Iterator[None]:
    """Under autocast, spares adapter layers the cast of their input to their weights' float32.

    Autocast would cast it straight back, so the result is the same bit for bit and two passes over
    each layer's input are saved. Without autocast this does nothing.
    """
    if not torch.is_autocast_enabled(_device_type(model)) or not hasattr(model, "peft_config"):
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(model):
        yield


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
