"""Tokenizers for a LLaVA of parts: an image has as many tokens as features."""

import json

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from tests.vision_parts import picture, save_tiny_dinov2, save_tiny_llm
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.models.processors import load_llava_processor

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=14)


@pytest.fixture
def parts(tmp_path):
    save_tiny_llm(tmp_path / "llm")
    save_tiny_dinov2(tmp_path / "tower")
    return tmp_path


def save_tower(parts, tower):
    tower.save_pretrained(parts / "other")
    settings = json.loads((parts / "tower" / "preprocessor_config.json").read_text())
    (parts / "other" / "preprocessor_config.json").write_text(json.dumps(settings))
    return parts / "other"


def test_registers_are_counted(parts):
    """'full' keeps class token and registers; each needs a place in the text."""
    config = Dinov2WithRegistersConfig(**SHAPE, image_size=28, mlp_ratio=2, num_register_tokens=3)
    tower = save_tower(parts, Dinov2WithRegistersModel(config))
    tokenizer = load_llava_processor(parts / "llm", tower, visual_select_strategy="full")
    assert tokenizer.vision.num_image_tokens((28, 28)) == 4 + 1 + 3
    method = LLaVAModel(
        load_causal_lm(parts / "llm"), load_visual_encoder(tower), tokenizer=tokenizer,
        freeze_llm=True, freeze_visual_encoder=True,
    )  # fmt: skip
    ids = torch.tensor([[5, *tokenizer.vision.expansion((28, 28)), 6]])
    images = tokenizer.vision.model_inputs([picture()])
    assert method.llm(input_ids=ids, **images).logits.shape[1] == ids.shape[1]


@pytest.mark.parametrize("image_size", [28, None])
def test_a_size_that_the_tower_cannot_see_is_refused_at_once(parts, image_size):
    """Without image_size it is the preprocessor's, here 28."""
    config = CLIPVisionConfig(**SHAPE, image_size=56, intermediate_size=32)
    tower = save_tower(parts, CLIPVisionModel(config))
    with pytest.raises(ValueError, match=r"sees images of 56 pixels only; set image_size=56"):
        load_llava_processor(parts / "llm", tower, image_size=image_size)
    assert load_llava_processor(parts / "llm", tower, image_size=56).vision.expansion((9, 9))
    assert load_llava_processor(parts / "llm", parts / "tower", image_size=56)  # DINOv2 stretches
