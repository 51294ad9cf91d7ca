"""Which models see images, as their files tell it. Imports no torch: mistakes are told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner_lite.models.hub import LLAVA_JSON, MODEL_CONFIG, has_processor


def sees_images(folder: Path) -> bool:
    """Whether a folder holds an image-text model with its processor, or the run of a LLaVA."""
    if (folder / LLAVA_JSON).is_file():
        return True
    return "vision_config" in _config(folder) and has_processor(folder)


def reads_text_only(folder: Path) -> bool:
    """Whether a folder surely holds a model of text; of adapters and runs it is not told here."""
    return bool(_config(folder)) and not sees_images(folder)


def _config(folder: Path) -> dict[str, Any]:
    """The model's config; {} where there is none, or none that can be read: its loader says so."""
    try:
        config = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
