"""Weights in Hugging Face form: adapter and model folders, written and read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner_lite.models.modes import without_progress_bars

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

#: Settings of an adapter that change what the same weights compute.
_ADAPTER_SETTINGS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out",
)  # fmt: skip


def save_adapter(
    model: PeftModel, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json (modules_to_save included).

    Args:
        model: the model with its adapter.
        folder: made when absent.
        state_dict: full tensors by the names of ``model.state_dict()``; None takes the model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # "auto" compares the vocabulary with the base model's, and asks the hub when it is not local.
    base_path = model.peft_config["default"].base_model_name_or_path
    is_local = bool(base_path) and (Path(base_path) / "config.json").is_file()
    embeddings = model.get_base_model().get_input_embeddings()
    trains_embeddings = any(p.requires_grad for p in embeddings.parameters(recurse=False))
    card = folder / "README.md"
    has_card = card.exists()
    model.save_pretrained(
        str(folder),
        state_dict=state_dict,
        save_embedding_layers=trains_embeddings or ("auto" if is_local else False),
    )
    if not has_card:
        card.unlink(missing_ok=True)  # peft's form with nothing filled in


def save_model(
    model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes model.safetensors (or shards of at most 5 GB), config.json, generation_config.json.

    Args:
        model: the model.
        folder: made when absent.
        state_dict: full tensors by the names of ``model.state_dict()``; None takes the model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if state_dict is not None:
        state_dict = dict(state_dict)  # transformers empties it while writing
    with without_progress_bars():
        model.save_pretrained(str(folder), state_dict=state_dict, max_shard_size="5GB")


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Takes the weights of an adapter folder.

    Raises:
        FileNotFoundError: the folder holds no adapter in safetensors form.
        ValueError: its tensors or its scaling do not fit the model's adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        hint = (
            "it holds a whole model: name it as the path of llm instead"
            if any((folder / name).is_file() for name in MODEL_WEIGHTS)
            else "give the folder that holds both (pickled adapter_model.bin files are not loaded)"
        )
        raise FileNotFoundError(
            f"{folder} has no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}, which the adapter of this "
            f"run needs; {hint}"
        )
    _compare_adapter_settings(model.peft_config["default"].to_dict(), folder)
    weights = load_file(str(folder / ADAPTER_WEIGHTS))
    # peft keeps the embeddings too where the vocabulary has grown; then they belong to what fits.
    has_embeddings = any(".base_layer." in name for name in weights)
    expected = get_peft_model_state_dict(model, save_embedding_layers=has_embeddings)
    weights = _named_as_today(weights, expected)
    _compare_tensors(
        expected, weights, f"the adapter in {folder} does not fit this model and adapter config",
        "use the base model, r and target_modules it was trained with",
    )  # fmt: skip
    set_peft_model_state_dict(model, weights)


def load_model_weights(model: PreTrainedModel, folder: Path) -> None:
    """Takes the weights of a model folder (safetensors).

    Raises:
        FileNotFoundError: the folder holds no model in safetensors form.
        ValueError: its tensors do not fit the model.
    """
    if not any((folder / name).is_file() for name in MODEL_WEIGHTS):
        hint = (
            "it holds an adapter: give the run lora=dict(...) to continue it"
            if (folder / ADAPTER_CONFIG).is_file()
            else "give a folder that holds one (pickled weights are not loaded)"
        )
        raise FileNotFoundError(f"{folder} has no {' or '.join(MODEL_WEIGHTS)}; {hint}")
    # A second model, because transformers renames and merges tensors of some architectures on the
    # way from disk; its loader is the one that knows how.
    loaded, info = type(model).from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True, local_files_only=True,
    )  # fmt: skip
    own = model.state_dict()
    weights = {
        name: tensor
        for name, tensor in loaded.state_dict().items()
        if name not in info["missing_keys"]
    }
    for name in info["unexpected_keys"]:
        weights.setdefault(name, torch.empty(0))
    _compare_tensors(
        own, weights, f"the model in {folder} does not fit {type(model).__name__}",
        "name the model the folder was saved from as the path of llm",
    )  # fmt: skip
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _named_as_today(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under transformers 4 a CLIP or SigLIP tower had one level of names more."""
    today = {name.replace(".vision_model.", ".", 1): value for name, value in weights.items()}
    return today if set(today) == set(expected) else weights


def _compare_adapter_settings(own: dict[str, Any], folder: Path) -> None:
    saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    different = [
        f"{name} is {_plain(saved[name])!r} there and {_plain(own[name])!r} here"
        for name in _ADAPTER_SETTINGS
        if name in saved and name in own and _plain(saved[name]) != _plain(own[name])
    ]
    if different:
        raise ValueError(
            f"the adapter in {folder} was made with other settings: {'; '.join(different)}; "
            "give lora the same values"
        )


def _plain(value: Any) -> Any:
    """Enum members compare by their value, absent dicts like empty ones."""
    return getattr(value, "value", value) or None


def _compare_tensors(
    expected: dict[str, Tensor], found: dict[str, Tensor], what: str, advice: str
) -> None:
    """Raises ValueError that names missing, unexpected and differently shaped tensors."""
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(set(found) - set(expected)):
        problems.append(f"unexpected: {_some(unexpected)}")
    if shapes := [
        f"{name} is {list(found[name].shape)} there and {list(expected[name].shape)} here"
        for name in sorted(set(expected) & set(found))
        if found[name].shape != expected[name].shape
    ]:
        problems.append(f"other shape: {_some(shapes)}")
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}; {advice}")


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
