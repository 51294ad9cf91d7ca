"""Writes a LLaVA in XTuner's layout, see xtuner_lite.models.llava_xtuner."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner_lite.export.publish import ExportError
from xtuner_lite.models.hub import PROJECTOR_DIR
from xtuner_lite.models.image_text_parts import pattern_of
from xtuner_lite.models.llava_files import (
    VISUAL_ENCODER_DIR,
    LlavaParts,
    is_llava_run,
    save_projector,
)
from xtuner_lite.models.llava_xtuner import ADAPTER_DIRS, LLM_DIR, write_parts
from xtuner_lite.models.modes import without_progress_bars
from xtuner_lite.models.packed_forward import unwrap_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PEFT = "base_model.model."


def write_xtuner_folder(model: Any, target: Path, source: Path, max_bytes: int) -> None:
    """Writes the parts of a LLaVA that were trained.

    Args:
        model: the LLaVA, or the PeftModel around it; of a run's folder ``source``.
        target: an empty folder.
        source: a folder of a LLaVA run, or a whole LLaVA, all of whose parts are then written.
        max_bytes: of a weight file.

    Raises:
        ExportError: the adapter is of a kind that cannot be cut in two.
    """
    base = unwrap_adapter(model)
    save_projector(base.model.multi_modal_projector, target / PROJECTOR_DIR)
    write_parts(target, base)
    if hasattr(model, "peft_config"):
        _write_adapters(model, base, target, LlavaParts.read(source))
    if (source / VISUAL_ENCODER_DIR).is_dir():
        shutil.copytree(source / VISUAL_ENCODER_DIR, target / VISUAL_ENCODER_DIR)
    if not is_llava_run(source):
        with without_progress_bars():
            for name, part in (
                (LLM_DIR, _language_model(base)),
                (VISUAL_ENCODER_DIR, base.model.vision_tower),
            ):
                part.save_pretrained(str(target / name), max_shard_size=max_bytes)


def _write_adapters(model: Any, base: Any, target: Path, parts: LlavaParts) -> None:
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    if type(config) is not LoraConfig or getattr(config, "trainable_token_indices", None):
        raise ExportError(
            f"a {type(config).__name__} on both parts (or one with new tokens) has no form in "
            "XTuner's layout; export the whole model: --format hf"
        )
    prefixes = {"llm": "model.language_model.", "visual_encoder": "model.vision_tower."}
    text = _language_model(base)
    decoder = next(n for n, m in text.named_modules() if m is text.get_decoder())
    renamed = {"llm": f"{decoder}.", "visual_encoder": ""}
    places = {"llm": parts.llm, "visual_encoder": parts.visual_encoder}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    written = set()
    for part, prefix in prefixes.items():
        tensors = {}
        for name, tensor in saved.items():
            own = name.removeprefix(_PEFT)
            is_head = part == "llm" and own.startswith("lm_head.")
            if own.startswith(prefix) or is_head:
                new = own if is_head else renamed[part] + own.removeprefix(prefix)
                tensors[_PEFT + new] = tensor.detach().cpu().contiguous()
                written.add(name)
        if not tensors:
            continue
        folder = target / ADAPTER_DIRS[part]
        folder.mkdir()
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        root = text if part == "llm" else base.model.vision_tower
        _config_of(config, tensors, root, part, places[part]).save_pretrained(str(folder))
    if left := sorted(set(saved) - written):
        raise ExportError(
            f"the adapter holds {left[0]}, which belongs to neither part, so it has no form in "
            "XTuner's layout; export the whole model: --format hf"
        )


def _config_of(config: Any, tensors: dict[str, Any], root: Any, part: str, place: str) -> Any:
    """The adapter config of one part: its targets, its rank and alpha as plain numbers."""
    own = copy.deepcopy(config)
    targets = {re.sub(r"\.lora_\w+(\.weight|\.bias)?$", "", n) for n in tensors if ".lora_" in n}
    targets = {name.removeprefix(_PEFT) for name in targets}
    all_names = [re.sub(r"\.base_layer$", "", name) for name, _ in root.named_modules()]
    own.target_modules = pattern_of(targets, all_names)
    own.inference_mode = True
    own.base_model_name_or_path = place
    if part == "visual_encoder":
        own.task_type = None
        own.r = next(iter(own.rank_pattern.values()), own.r)
        own.lora_alpha = next(iter(own.alpha_pattern.values()), own.lora_alpha)
    own.rank_pattern, own.alpha_pattern = _patterns(config, part)
    return own


def _patterns(config: Any, part: str) -> tuple[dict[str, int], dict[str, int]]:
    """The rank and alpha patterns of the language model; merge_adapters put the tower's first."""
    if part == "visual_encoder":
        return {}, {}
    kept = [
        {key: value for key, value in patterns.items() if "vision_tower" not in key}
        for patterns in (config.rank_pattern or {}, config.alpha_pattern or {})
    ]
    return kept[0], kept[1]


def _language_model(base: Any) -> PreTrainedModel:
    """The causal language model inside a LLaVA: the same modules in the form of its own class."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(base.config.text_config))
    model.config = base.config.text_config
    decoder = next(name for name, m in model.named_modules() if m is model.get_decoder())
    model.set_submodule(decoder, base.model.language_model)
    model.set_output_embeddings(base.lm_head)
    model.generation_config = copy.deepcopy(base.generation_config)
    return model
