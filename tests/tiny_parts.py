"""Folders of a tiny language model and a tiny vision tower, as a config names them."""

from __future__ import annotations

import json
from pathlib import Path


def write_tiny_llm(folder: Path) -> Path:
    """A random Llama of 2 layers with its tokenizer (ChatML)."""
    from tests.tiny import tiny_llama, tiny_tokenizer

    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_tower(folder: Path) -> Path:
    """A random DINOv2 of 28-pixel images with patches of 14, with its image processor."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from xtuner_lite.models.wheel_dinov2 import PREPROCESSOR

    shape = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = Dinov2Model(Dinov2Config(**shape, image_size=28, patch_size=14))
    tower.save_pretrained(folder)
    sizes = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **sizes}))
    return folder
