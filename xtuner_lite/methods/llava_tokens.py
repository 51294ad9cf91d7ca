"""What a LLaVA and its tokenizer must agree on, so that images have as many tokens as features."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xtuner_lite.images.vision_inputs import VisionInputs


def image_token_of(vision: VisionInputs | None, given: int | None) -> int:
    """Id of the image token: the tokenizer's, or the one that is given.

    Raises:
        ValueError: there is none, or they differ.
    """
    if vision is None and given is None:
        raise ValueError(
            "the tokenizer knows no image token, so the model could not tell where images stand; "
            "write tokenizer=dict(type=load_llava_processor, llm=..., visual_encoder=...), or give "
            "image_token_id"
        )
    own = vision.image_token_id if vision is not None else given
    if given is not None and given != own:
        raise ValueError(
            f"image_token_id is {given}, and the tokenizer's image token has the id {own}; leave "
            "image_token_id out"
        )
    return own


def select_strategy_of(
    vision: VisionInputs | None, given: str | None, tower: PreTrainedModel
) -> str:
    """The select strategy; the tokenizer's processor must count an image's tokens by the same.

    Raises:
        ValueError: they differ, or the processor is that of another tower.
    """
    processor = getattr(vision, "processor", None)
    own = getattr(processor, "vision_feature_select_strategy", None)
    if given is not None and own is not None and given != own:
        raise ValueError(
            f"visual_select_strategy is {given!r} in the model and {own!r} in the tokenizer, so "
            "they would count the tokens of an image differently; give both the same"
        )
    patch = getattr(processor, "patch_size", None)
    if patch is not None and patch != tower.config.patch_size:
        raise ValueError(
            f"the vision tower's patches are {tower.config.patch_size} pixels wide, the "
            f"tokenizer's {patch}; name the same visual_encoder in both"
        )
    return given or own or "default"
