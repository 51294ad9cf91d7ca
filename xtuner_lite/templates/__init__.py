"""Chat templates: the tokenizer's own with a proved loss mask, and named presets."""

from __future__ import annotations

from typing import Any

_HOMES = {
    "ChatTemplate": "adapter",
    "Encoded": "tokenise",
    "RowRefused": "layout",
    "TemplateError": "layout",
    "TemplateParts": "parts",
    "apply_template": "apply",
    "preset_names": "apply",
    "stop_token_ids": "adapter",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports transformers only when one of the names is used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
