"""xtuner_lite: fine-tune language and vision-language models from Python config files.

The public names below are imported when they are first used: `import xtuner_lite` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from xtuner_lite.version import __version__

_HOMES = {
    "ChatDataset": "xtuner_lite.data.dataset",
    "ChatSession": "xtuner_lite.chat.session",
    "ChatTemplate": "xtuner_lite.templates",
    "LossOutput": "xtuner_lite.structures",
    "Runner": "xtuner_lite.runner.runner",
    "SupervisedFinetune": "xtuner_lite.methods.sft",
    "TrainingMethod": "xtuner_lite.methods.base",
    "check_config": "xtuner_lite.config",
    "generate_reply": "xtuner_lite.models.generate",
    "load_causal_lm": "xtuner_lite.models.loading",
    "load_config": "xtuner_lite.config",
    "load_tokenizer": "xtuner_lite.models.loading",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'xtuner_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
