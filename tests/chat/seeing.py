"""Small models that see, as folders: a whole LLaVA, and runs of one whose parts lie elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig

from tests.vision_parts import picture, save_tiny_dinov2, save_tiny_llm, vision_tokenizer
from xtuner_lite.images.vision_inputs import save_tokenizer
from xtuner_lite.methods.llava import LLaVAModel
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.loading import load_causal_lm

#: Colours that the random model answers differently.
COLOURS = ("red", "blue")


def save_seeing(root: Path) -> dict[str, Path]:
    """Folders in ``root``: 'llm', 'tower', 'first' (the run of a projector), 'run' (projector and
    LoRA) and 'whole' (a LLaVA); files 'red' and 'blue' (pictures), 'damaged' (no picture)."""
    import torch

    llm, tower = save_tiny_llm(root / "llm"), save_tiny_dinov2(root / "tower")
    tokenizer = vision_tokenizer(root)
    runs = {"first": {"freeze_llm": True}, "run": {"llm_lora": LoraConfig(r=2)}, "whole": {}}
    for name, options in runs.items():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            method = LLaVAModel(
                load_causal_lm(llm), load_visual_encoder(tower), tokenizer=tokenizer,
                freeze_visual_encoder=True, **options,
            )  # fmt: skip
            for parameter in method.projector.parameters():  # what it sees shall be seen
                torch.nn.init.normal_(parameter, std=0.5)
        method.save_pretrained(root / name)
        save_tokenizer(tokenizer, root / name)
    for colour in COLOURS:
        picture(colour).save(root / f"{colour}.png")
    (root / "damaged.png").write_bytes((root / "red.png").read_bytes()[:40])
    return {path.stem: path for path in root.iterdir()}


def image(path: Any) -> dict[str, Any]:
    """An image part."""
    return {"type": "image", "image": str(path)}
