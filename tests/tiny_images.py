"""Small random image-text models of several families, and batches with random images for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tests.tiny import tiny_llama

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from xtuner_lite.structures import Batch

#: Id of the image token in all of them, and of a token before and after each image.
IMAGE, BEFORE, AFTER = 383, 381, 380
#: Rows (images) -> model inputs, with the number of tokens of one image.
Images = Callable[[int], "dict[str, Tensor]"]

_TEXT = dict(
    vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    pad_token_id=0, eos_token_id=2, bos_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
_TOWER = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
    image_size=16, patch_size=8, initializer_range=0.2,
)  # fmt: skip


def tiny_tower(kind: str = "clip", *, hidden_size: int = 16, seed: int = 1) -> PreTrainedModel:
    """A random vision tower, 'clip', 'siglip' or 'dinov2': 3 layers, 16-pixel images, 4 patches."""
    import transformers

    config, model = {
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config(**{**_TOWER, "hidden_size": hidden_size})).train()


def tiny_llava(kind: str = "clip", *, projector_depth: int = 2, **llama: Any) -> PreTrainedModel:
    """A LLaVA of a tiny Llama and a tiny tower; 4 tokens an image."""
    from xtuner_lite.models.llava import build_llava

    strategy = "full" if kind == "siglip" else "default"
    return build_llava(
        tiny_llama(**llama), tiny_tower(kind), image_token_id=IMAGE,
        projector_depth=projector_depth, visual_select_strategy=strategy,
    )  # fmt: skip


def tiny_image_text(family: str) -> tuple[PreTrainedModel, int, Images]:
    """(model, tokens of an image, number of images -> their inputs) of a family."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokens, images = _FAMILIES[family]()
    return model.train(), tokens, images


def image_batch(
    images: Images, segments: list[tuple[int, int]], *, tokens: int = 4, seed: int = 1
) -> Batch:
    """One packed row of segments (number of images, tokens of text that are learnt)."""
    random = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(3, 370, (length,), generator=random).tolist()

    ids, labels, positions, lengths = [], [], [], [0]
    for num_images, num_learnt in segments:
        segment = text(2)
        for _ in range(num_images):
            segment += [BEFORE] + [IMAGE] * tokens + [AFTER]
        hidden = len(segment)
        segment += text(num_learnt)
        ids += segment
        labels += [-100] * hidden + segment[hidden:]
        positions += range(len(segment))
        lengths.append(len(segment))
    total = sum(n for n, _ in segments)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pixels = images(total)
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "cu_seqlens": torch.tensor(lengths).cumsum(0).int(),
        "num_tokens": len(ids),
        "row_ids": [[f"tiny:{i}" for i in range(len(segments))]],
        "images": pixels,
        "num_images": total,
    }


def plain_images(num_images: int) -> dict[str, Tensor]:
    """Random 16-pixel images of a tiny LLaVA."""
    return {"pixel_values": torch.randn(num_images, 3, 16, 16)}


def _llava() -> tuple[PreTrainedModel, int, Images]:
    return tiny_llava(tie_word_embeddings=False), 4, plain_images


def _qwen(name: str, **vision: Any) -> tuple[PreTrainedModel, int, Images]:
    import transformers

    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    text = {key: value for key, value in _TEXT.items() if key != "head_dim" or "3" in name}
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(text, rope_parameters=rope),
        vision_config=dict(depth=2, num_heads=2, patch_size=4, **vision),
        image_token_id=IMAGE, video_token_id=382, vision_start_token_id=BEFORE,
        vision_end_token_id=AFTER, tie_word_embeddings=False,
    )  # fmt: skip

    def images(number: int) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(number * 16, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * number).reshape(number, 3),
        }

    return getattr(transformers, f"{name}ForConditionalGeneration")(config), 4, images


def _idefics(name: str) -> tuple[PreTrainedModel, int, Images]:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vision_config=dict(_TOWER, num_hidden_layers=2, patch_size=4),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE, scale_factor=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip

    def images(number: int) -> dict[str, Tensor]:
        mask = torch.ones(1, number, 16, 16, dtype=torch.int64)
        return {"pixel_values": torch.randn(1, number, 3, 16, 16), "pixel_attention_mask": mask}

    return getattr(transformers, f"{name}ForConditionalGeneration")(config), 4, images


def _gemma3() -> tuple[PreTrainedModel, int, Images]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    config = Gemma3Config(
        text_config=Gemma3TextConfig(**{**_TEXT, "num_hidden_layers": 6}, sliding_window=4),
        vision_config=dict(_TOWER, num_hidden_layers=2, patch_size=4),
        mm_tokens_per_image=4, image_token_index=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config), 4, plain_images


def _internvl() -> tuple[PreTrainedModel, int, Images]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig

    config = InternVLConfig(
        vision_config=dict(_TOWER, num_hidden_layers=2, image_size=[16, 16], patch_size=[4, 4]),
        text_config=LlamaConfig(**_TEXT), image_token_id=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), 4, plain_images


def _onevision() -> tuple[PreTrainedModel, int, Images]:
    import transformers

    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**{**_TOWER, "patch_size": 4}),
        text_config=transformers.LlamaConfig(**_TEXT), image_token_index=IMAGE,
        video_token_index=382, image_grid_pinpoints=[[16, 16], [16, 32]], vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip

    def images(number: int) -> dict[str, Tensor]:
        sizes = torch.tensor([[16, 16]] * number).reshape(number, 2)
        return {"pixel_values": torch.randn(number, 2, 3, 16, 16), "image_sizes": sizes}

    # The image, its one crop, and the end of each of the crop's rows: 16 + 16 + 4.
    return transformers.LlavaOnevisionForConditionalGeneration(config), 36, images


def _mistral3() -> tuple[PreTrainedModel, int, Images]:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig

    config = Mistral3Config(
        vision_config=dict(
            _TOWER, model_type="pixtral", num_hidden_layers=2, head_dim=8, patch_size=4
        ),
        text_config=MistralConfig(**_TEXT), image_token_index=IMAGE, spatial_merge_size=2,
        vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip

    def images(number: int) -> dict[str, Tensor]:
        sizes = torch.tensor([[16, 16]] * number).reshape(number, 2)
        return {"pixel_values": torch.randn(number, 3, 16, 16), "image_sizes": sizes}

    return Mistral3ForConditionalGeneration(config), 4, images


def _paligemma() -> tuple[PreTrainedModel, int, Images]:
    import transformers

    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_TOWER, projection_dim=32),
        text_config=transformers.GemmaConfig(**_TEXT), image_token_index=IMAGE, projection_dim=32,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), 4, plain_images


_FAMILIES: dict[str, Callable[[], tuple[Any, int, Images]]] = {
    "llava": _llava,
    "qwen2_vl": lambda: _qwen("Qwen2VL", embed_dim=16, hidden_size=32, mlp_ratio=2),
    "qwen2_5_vl": lambda: _qwen(
        "Qwen2_5_VL", hidden_size=16, intermediate_size=32, out_hidden_size=32, window_size=16,
        fullatt_block_indexes=[1],
    ),
    "qwen3_vl": lambda: _qwen(
        "Qwen3VL", hidden_size=16, intermediate_size=32, out_hidden_size=32,
        num_position_embeddings=64, deepstack_visual_indexes=[0],
    ),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "idefics3": lambda: _idefics("Idefics3"),
    "gemma3": _gemma3,
    "internvl": _internvl,
    "llava_onevision": _onevision,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
}  # fmt: skip
#: Families whose packed samples are isolated.
ISOLATED = tuple(name for name in _FAMILIES if name != "paligemma")
