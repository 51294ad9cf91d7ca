"""Tiny stand-ins for tests of images: a vision tower's folder, a language model's, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_llama, tiny_tokenizer

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def save_tiny_llm(folder: Path, **config: Any) -> Path:
    """A folder of tiny_llama and tiny_tokenizer; its embeddings have room for an image token."""
    tiny_tokenizer().save_pretrained(str(folder))
    tiny_llama(**{"vocab_size": 400, **config}).save_pretrained(str(folder))
    return folder


def save_tiny_dinov2(folder: Path, *, image_size: int = 28, hidden_size: int = 32) -> Path:
    """A folder of a random Dinov2Model (2 layers, patch 14) with its preprocessor's settings."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Dinov2Model(
            Dinov2Config(
                hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2,
                image_size=image_size, patch_size=14,
            )
        )  # fmt: skip
    model.save_pretrained(str(folder))
    settings = {
        "image_processor_type": "BitImageProcessor", "image_mean": MEAN, "image_std": STD,
        "size": {"shortest_edge": image_size}, "resample": 3,
        "crop_size": {"height": image_size, "width": image_size},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def vision_tokenizer(folder: Path, **options: Any) -> Any:
    """A tiny tokenizer that reads images as 4 tokens (28 x 28 pixels in patches of 14)."""
    from xtuner_lite.models.processors import load_llava_processor

    llm, tower = folder / "llm", folder / "tower"
    if not llm.exists():
        save_tiny_llm(llm)
        save_tiny_dinov2(tower)
    return load_llava_processor(llm, tower, **{"image_size": 28, **options})


def picture(color: Any = "red", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Any:
    """A PIL image of one colour."""
    from PIL import Image

    return Image.new(mode, size, color)
