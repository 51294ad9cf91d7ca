"""Trained weights for a LLaVA from wherever they lie; none are left out without a word."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner_lite.models.hub import ADAPTER_CONFIG, LLAVA_JSON, MODEL_CONFIG, PROJECTOR_DIR
from xtuner_lite.models.llava_files import (
    VISUAL_ENCODER_DIR,
    LlavaParts,
    lasting_path,
    load_projector,
    read_projector,
    tower_differs,
)
from xtuner_lite.models.modes import without_progress_bars
from xtuner_lite.models.weights import MODEL_WEIGHTS, load_adapter_weights, load_model_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xtuner_lite.methods.llava import LLaVAModel

logger = logging.getLogger(__name__)

_XTUNER_PARTS = ("llm_adapter", "visual_encoder_adapter", "llm")


def take_weights(method: LLaVAModel, path: str | Path) -> None:
    """Takes all trained weights that lie at ``path``.

    Args:
        method: gets them.
        path: the checkpoint folder of a LLaVA run, a Hugging Face LLaVA folder, or a projector's
            folder or file.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they do not fit, or this run has no place for some of them: it would train on
            with them and save a checkpoint without them.
    """
    path = Path(path).expanduser()
    if path.is_dir() and _is_whole_model(path):
        _take_whole_model(method, path)
        return
    tensors = read_projector(path)
    others = [name for name in _XTUNER_PARTS if (path / name).is_dir()]
    if others:
        raise ValueError(
            f"{path} holds {' and '.join(others)} beside the projector, in XTuner's form, which "
            f"are not taken; name the projector alone: {path / PROJECTOR_DIR}"
        )
    if path.is_dir():
        _check_features(method, path)
        _check_tower(method, path)
        _check_adapter(method, path)
    load_projector(method.projector, tensors, path)
    taken = ["projector"]
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        load_adapter_weights(method.llm, path)
        taken.append("adapter")
    elif method.has_adapter:
        logger.info("%s holds no adapter: that of this run starts anew", path)
    if (path / VISUAL_ENCODER_DIR).is_dir() and method._tower_is == "full":
        load_model_weights(method.visual_encoder, path / VISUAL_ENCODER_DIR)
        taken.append("vision tower")
    logger.info("taken from %s: %s", path, ", ".join(taken))


def _is_whole_model(path: Path) -> bool:
    is_projector = not (path / PROJECTOR_DIR).is_dir() and _model_type(path) == "projector"
    has_weights = any((path / name).is_file() for name in MODEL_WEIGHTS)
    return has_weights and (path / MODEL_CONFIG).is_file() and not is_projector


def _model_type(path: Path) -> str | None:
    file = path / MODEL_CONFIG
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("model_type")


def _check_features(method: LLaVAModel, path: Path) -> None:
    """A projector fits the features it learnt from alone; others have the same width."""
    own = method.llava.config
    if (path / LLAVA_JSON).is_file():
        parts = LlavaParts.read(path)
        theirs = (parts.visual_select_layer, parts.visual_select_strategy)
        _tell_other_parts(method, path, parts)
    elif _is_whole_model(path):
        saved = json.loads((path / MODEL_CONFIG).read_text(encoding="utf-8"))
        theirs = (
            saved.get("vision_feature_layer", -2),
            saved.get("vision_feature_select_strategy", "default"),
        )
    else:
        saved = _projector_config(path)
        if "visual_select_layer" not in saved:
            return  # a projector alone, which tells nothing of them
        theirs = (saved["visual_select_layer"], saved["visual_select_strategy"])
    ours = (own.vision_feature_layer, own.vision_feature_select_strategy)
    states = own.vision_config.num_hidden_layers + 1  # the last of them is also called -1
    if isinstance(theirs[0], int) and theirs[0] % states == ours[0] % states:
        theirs = (ours[0], theirs[1])
    if theirs != ours:
        raise ValueError(
            f"the projector in {path} learnt from features of visual_select_layer={theirs[0]}, "
            f"visual_select_strategy={theirs[1]!r}, and this run gives it those of {ours[0]}, "
            f"{ours[1]!r}; set both as there"
        )


def _projector_config(path: Path) -> dict[str, Any]:
    files = (path / PROJECTOR_DIR / MODEL_CONFIG, path / MODEL_CONFIG)
    file = next((file for file in files if file.is_file()), None)
    return {} if file is None else json.loads(file.read_text(encoding="utf-8"))


def _tell_other_parts(method: LLaVAModel, path: Path, parts: LlavaParts) -> None:
    """Warns of parts of another name; they may only have been moved, so it is no error."""
    places = [("llm", parts.llm), ("visual_encoder", parts.visual_encoder)]
    for (name, place), own in zip(places, method._places, strict=True):
        here = lasting_path(own)
        if name == "visual_encoder" and (path / VISUAL_ENCODER_DIR).is_dir():
            continue  # its weights are compared
        if place and here and Path(place).name != Path(here).name:
            logger.warning(
                "%s was trained with the %s %s, and this run has %s: what it learnt there may mean "
                "nothing here", path, name, place, here,
            )  # fmt: skip


def _check_tower(method: LLaVAModel, path: Path) -> None:
    saved = path / VISUAL_ENCODER_DIR
    if not saved.is_dir() or method._tower_is == "full":
        return
    if tower_differs(method.visual_encoder, saved):
        raise ValueError(
            f"{path} holds a vision tower that was trained, and this run has another, which it "
            f"does not train; write visual_encoder=dict(type=load_visual_encoder, "
            f"path={str(saved)!r})"
        )


def _check_adapter(method: LLaVAModel, path: Path) -> None:
    if (path / ADAPTER_CONFIG).is_file() and not method.has_adapter:
        raise ValueError(
            f"{path} holds an adapter, and this run has none; give llm_lora (and "
            "visual_encoder_lora) as in that run to continue it, or merge it first: "
            f"xtuner-lite convert llava {path} OUT, and name OUT in load_image_text_model"
        )


def _take_whole_model(method: LLaVAModel, path: Path) -> None:
    """From a Hugging Face LLaVA: all of it, or its projector where the other parts are the same."""
    model_type = _model_type(path)
    if model_type != method.llava.config.model_type:
        raise ValueError(
            f"{path} holds a {model_type!r} model, and this is a "
            f"{method.llava.config.model_type!r}; name a LLaVA of the same projector_depth"
        )
    _check_features(method, path)
    if method.saves_whole_model:
        load_model_weights(method.llm, path)
        logger.info("taken from %s: the whole model", path)
        return
    with without_progress_bars():
        saved = type(method.llava).from_pretrained(
            str(path), dtype="auto", use_safetensors=True, local_files_only=True
        )
    if different := _first_difference(method.llava, saved):
        raise ValueError(
            f"{path} holds a LLaVA whose language model or vision tower is another than this "
            f"run's ({different}), and this run does not train it, so it would be lost; start from "
            f"the whole model: ImageTextFinetune with llm=dict(type=load_image_text_model, "
            f"path={str(path)!r})"
        )
    tensors = saved.model.multi_modal_projector.state_dict()
    load_projector(method.projector, tensors, path)
    logger.info("taken from %s: projector (its other parts are those of this run)", path)


def _first_difference(own: PreTrainedModel, saved: PreTrainedModel) -> str | None:
    """Name of a tensor outside the projector that is not the same in both."""
    ours = {n.replace(".base_layer.", "."): t for n, t in own.state_dict().items()}
    for name, tensor in saved.state_dict().items():
        if "multi_modal_projector" in name:
            continue
        mine = ours.get(name)
        if mine is None or mine.shape != tensor.shape:
            return name
        if not torch.equal(mine.cpu(), tensor.to(mine.dtype)):
            return name
    return None
