"""A LLaVA in XTuner's layout, as XTuner published its models and our export writes them.

    projector/                 config.json, model.safetensors
    llm_adapter/               a peft adapter for the language model alone
    visual_encoder_adapter/    one for the vision tower alone
    llm/, visual_encoder/      where they were trained in full

The layout does not say how the parts are put together. Ours has three more keys in the projector's
config.json (:data:`PUT_TOGETHER`); without them XTuner's own defaults hold.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.models.hub import MODEL_CONFIG, PROJECTOR_DIR, is_xtuner_llava
from xtuner_lite.models.llava_files import (
    VISUAL_ENCODER_DIR,
    LlavaParts,
    load_projector,
    read_projector,
)

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedModel

logger = logging.getLogger(__name__)

LLM_DIR = "llm"
ADAPTER_DIRS = {"llm": "llm_adapter", "visual_encoder": "visual_encoder_adapter"}
#: Keys of the projector's config.json that only our export writes, with XTuner's defaults.
PUT_TOGETHER = {"visual_select_layer": -2, "visual_select_strategy": None, "image_token_id": None}


class UnnamedPart(ValueError):
    """A part that the folder does not hold was not named."""


def open_xtuner_llava(
    folder: str | Path,
    *,
    llm: str | Path | None = None,
    visual_encoder: str | Path | None = None,
    dtype: Any = None,
    quantization: Any = None,
    attn: Any = "auto",
) -> LlavaForConditionalGeneration:
    """The LLaVA of such a folder, its adapters merged (on a quantised language model: beside it).

    Args:
        folder: with projector/ and the rest.
        llm: the language model, where the folder holds none.
        visual_encoder: the vision tower, where the folder holds none.
        dtype: see load_image_text_model, like ``quantization`` and ``attn``.

    Raises:
        FileNotFoundError: a part is not there.
        UnnamedPart: a part that the folder does not hold was not named.
        ValueError: a part was named and is in the folder too; the weights do not fit.
    """
    from xtuner_lite.models.llava import build_llava, load_visual_encoder
    from xtuner_lite.models.loading import load_causal_lm

    folder = Path(folder).expanduser()
    parts = read_parts(folder, llm, visual_encoder)
    text = load_causal_lm(parts.llm, dtype=dtype, quantization=quantization, attn=attn)
    tower = load_visual_encoder(parts.visual_encoder, dtype=dtype)
    # Before they are put together: layers are replaced, and the head is held by the whole too.
    _adapt(text, folder / ADAPTER_DIRS["llm"], merge=quantization is None)
    _adapt(tower, folder / ADAPTER_DIRS["visual_encoder"], merge=True)
    model = build_llava(text, tower, **parts.building())
    load_projector(model.model.multi_modal_projector, read_projector(folder), folder)
    model.name_or_path = model.config._name_or_path = str(folder.resolve())
    return model.eval()


def read_parts(
    folder: Path, llm: str | Path | None = None, visual_encoder: str | Path | None = None
) -> LlavaParts:
    """How the LLaVA of a folder is put together, and where its parts lie.

    Raises:
        FileNotFoundError: the folder has no projector's config.json.
        UnnamedPart: a part that the folder does not hold was not named.
        ValueError: a part was named and is in the folder too; the projector is of another kind.
    """
    file = folder / PROJECTOR_DIR / MODEL_CONFIG
    if not is_xtuner_llava(folder):
        raise FileNotFoundError(f"{folder} is no LLaVA in XTuner's layout: it has no {file}")
    saved = json.loads(file.read_text(encoding="utf-8"))
    if (act := saved.get("hidden_act", "gelu")) != "gelu":
        raise ValueError(
            f"{file} has hidden_act={act!r}; the projectors of this project have 'gelu' between "
            "their layers, and another would answer wrongly"
        )
    llm = _place(folder, "llm", LLM_DIR, llm)
    visual_encoder = _place(folder, "visual_encoder", VISUAL_ENCODER_DIR, visual_encoder)
    if "visual_select_layer" not in saved:
        logger.warning(
            "%s does not say which hidden state of the vision tower the projector learnt from; "
            "XTuner's default is taken, %d. If it was another, write \"visual_select_layer\" there",
            file, PUT_TOGETHER["visual_select_layer"],
        )  # fmt: skip
    found = {name: saved.get(name, default) for name, default in PUT_TOGETHER.items()}
    strategy = found["visual_select_strategy"] or _strategy_of(visual_encoder)
    token = found["image_token_id"]
    return LlavaParts(
        llm=llm,
        visual_encoder=visual_encoder,
        projector_depth=saved.get("depth", 2),
        visual_select_layer=found["visual_select_layer"],
        visual_select_strategy=strategy,
        image_token_id=_token_of(llm, visual_encoder, strategy) if token is None else token,
        image_seq_length=None,
    )


def write_parts(folder: Path, model: LlavaForConditionalGeneration) -> None:
    """Adds to a folder's projector how the LLaVA is put together."""
    file = folder / PROJECTOR_DIR / MODEL_CONFIG
    saved = json.loads(file.read_text(encoding="utf-8"))
    values = (
        model.config.vision_feature_layer,
        model.config.vision_feature_select_strategy,
        model.config.image_token_id,
    )
    saved.update(zip(PUT_TOGETHER, values, strict=True))
    file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _place(folder: Path, name: str, inside: str, given: str | Path | None) -> str:
    own = folder / inside
    if not own.is_dir():
        if given is None:
            raise UnnamedPart(
                f"{folder} is a LLaVA in XTuner's layout, which does not say which {name} it "
                f"belongs to; name it: {name}=..."
            )
        return str(given)
    if given is not None and Path(given).expanduser().resolve() != own.resolve():
        raise ValueError(
            f"{name} is {str(given)!r}, and {folder} holds one of its own that was trained; leave "
            f"{name} out, or name {own}"
        )
    return str(own)


def _strategy_of(visual_encoder: str) -> str:
    """XTuner leaves the class token out, of towers that have one."""
    from transformers import AutoConfig

    from xtuner_lite.models.hub import resolve_model_path
    from xtuner_lite.models.llava import extra_tokens_of

    config = AutoConfig.from_pretrained(str(resolve_model_path(visual_encoder)))
    config = getattr(config, "vision_config", None) or config
    return "default" if extra_tokens_of(config) else "full"


def _token_of(llm: str, visual_encoder: str, strategy: str) -> int:
    """The id that load_llava_processor gives the image token."""
    from xtuner_lite.images.vision_inputs import vision_of
    from xtuner_lite.models.processors import load_llava_processor

    tokenizer = load_llava_processor(llm, visual_encoder, visual_select_strategy=strategy)
    return vision_of(tokenizer).image_token_id


def _adapt(part: PreTrainedModel, folder: Path, *, merge: bool) -> None:
    """Puts the adapter of a folder, if there is one, onto a part that stays where it is."""
    from xtuner_lite.models.loading import load_adapter

    if not folder.is_dir():
        return
    adapted = load_adapter(part, folder)
    if merge:
        adapted.merge_and_unload(safe_merge=True)
