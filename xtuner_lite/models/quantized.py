"""Bytes of a base model that bitsandbytes quantises, from its shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xtuner_lite.models.packed_forward import unwrap_adapter


def quantized_bytes(llm: nn.Module, quantization: Any, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes that quantisation saves, bytes of the largest weight that is dequantised for use).

    bitsandbytes quantises every linear layer of the language model but the head. 4-bit: half a byte
    a weight, and for each block of 64 a float32 scale, or with double quantisation one byte and a
    float32 for 256 blocks (Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3). 8-bit: one
    byte a weight and a float32 for each row (Dettmers et al. 2022, "LLM.int8()", arXiv
    2208.07339).

    Args:
        llm: the model or PeftModel.
        quantization: None, '4bit', '8bit' or a config, as load_causal_lm's.
        dtype: compute dtype.

    Raises:
        ValueError: a quantisation that is not bitsandbytes'.
    """
    bits, double = _bits_of(quantization)
    if bits is None:
        return 0, 0
    saved = largest = 0
    for module in unwrap_adapter(llm).get_decoder().modules():
        if not isinstance(module, nn.Linear) or module.weight.requires_grad:
            continue
        count = module.weight.numel()
        if bits == 8:
            stored = count + 4 * module.out_features
        else:
            blocks = -(-count // 64)
            stored = count // 2 + (blocks + 4 * -(-blocks // 256) if double else 4 * blocks)
        saved += dtype.itemsize * count - stored
        largest = max(largest, dtype.itemsize * count)
    return saved, largest


def _bits_of(quantization: Any) -> tuple[int | None, bool]:
    """(4, 8 or None; whether scales are quantised too) of load_causal_lm's quantization."""
    if quantization is None or quantization in ("4bit", "8bit"):
        return {None: None, "4bit": 4, "8bit": 8}[quantization], True
    settings = quantization if isinstance(quantization, dict) else vars(quantization)
    load_in_4bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    if load_in_4bit or settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return 4 if load_in_4bit else 8, bool(settings.get("bnb_4bit_use_double_quant"))
    raise ValueError(
        f"quantization is {quantization!r}; memory is known for '4bit', '8bit' and a "
        "BitsAndBytesConfig with load_in_4bit or load_in_8bit"
    )
