"""How a model is opened: what attn='auto' and quantization='4bit' stand for."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Quantization = Literal["4bit", "8bit"]
_ISOLATED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def choose_attention(config: PretrainedConfig) -> str | None:
    """The attention implementation 'auto' stands for; None leaves the choice to transformers."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import is_flash_attn_2_available

    from xtuner_lite.models.attention import PACKED_SDPA

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:  # code that came with the weights
        return None
    has_flash = torch.cuda.is_available() and is_flash_attn_2_available()
    if has_flash and model_class._supports_flash_attn:
        return "flash_attention_2"
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    fits = (
        model_class._supports_sdpa
        and model_class._supports_attention_backend
        and layer_types <= _ISOLATED_LAYER_TYPES
        and getattr(text, "attn_logit_softcapping", None) is None  # sdpa has no soft cap
        and text is config  # several modalities may mix attention patterns
    )
    return PACKED_SDPA if fits else None


def quantization_config(quantization: Any) -> Any:
    """The transformers quantisation config that a config's ``quantization`` stands for, or None.

    Raises:
        ImportError: the bitsandbytes package is missing.
        ValueError: an unknown name.
    """
    if quantization is None:
        return None
    if isinstance(quantization, dict) and callable(quantization.get("type")):
        settings = dict(quantization)
        return settings.pop("type")(**settings)
    if not isinstance(quantization, str):
        return quantization
    if quantization in ("4bit", "8bit") and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantization={quantization!r} needs the bitsandbytes package: "
            "pip install bitsandbytes"
        )
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ValueError(
        f"quantization is {quantization!r}; allowed: '4bit', '8bit', None, or a config such as "
        "dict(type=BitsAndBytesConfig, load_in_4bit=True)"
    )
