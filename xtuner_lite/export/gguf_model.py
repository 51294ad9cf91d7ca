"""A Hugging Face model in GGUF: shapes and settings for llama.cpp, tensors under its names.

The `gguf` package of llama.cpp writes the file and knows the names; its converter script is not
published as a package that is kept up, so the few architectures below are described here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtuner_lite.export.publish import ExportError
from xtuner_lite.export.tensor_files import WeightFiles

#: model_type -> architecture in llama.cpp.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: Types a tensor of two dimensions may have, and the number general.file_type has for them.
OUTTYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
_BLOCK = 32  # numbers that share a scale; a row must hold a whole number of blocks


def architecture_of(config: dict[str, Any]) -> str:
    """llama.cpp's name of a model's architecture.

    Raises:
        ExportError: it is not one of ARCHITECTURES, or has a part that is not described here.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"model_type is {kind!r}; GGUF is written for {', '.join(ARCHITECTURES)} (InternLM2: "
            "write it as Llama first: xtuner-lite convert split MODEL OUT). For others use "
            "llama.cpp's own convert_hf_to_gguf.py on the merged folder"
        )
    if config.get("mlp_bias"):
        raise ExportError(
            "the model has biases in its MLP (mlp_bias), which llama.cpp's llama has not"
        )
    if config.get("use_sliding_window") or (kind == "mistral" and config.get("sliding_window")):
        raise ExportError(
            "the model attends in a sliding window, which is not written; use llama.cpp's own "
            "convert_hf_to_gguf.py on the merged folder"
        )
    return ARCHITECTURES[kind]


def add_settings(writer: Any, config: dict[str, Any], name: str, outtype: str) -> None:
    """Writes the model's shapes, norms and rotary settings.

    Raises:
        ExportError: a rotary scaling that is not described here.
    """
    heads, kv_heads, head_dim = _heads(config)
    writer.add_name(name)
    writer.add_file_type(OUTTYPES[outtype])
    writer.add_quantization_version(2)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = rope_settings(config)
    writer.add_rope_freq_base(rope["theta"])
    kind = rope["type"]
    if kind in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "dynamic", "llama3"):
        raise ExportError(
            f"rotary scaling {kind!r} is not written to GGUF; known: default, dynamic (up to the "
            "trained length), linear, yarn, llama3"
        )


def limits_of(config: dict[str, Any]) -> list[str]:
    """What the file cannot do and the model can, as sentences."""
    if rope_settings(config)["type"] != "dynamic":
        return []
    length = config["max_position_embeddings"]
    return [
        f"the model's rotary scaling 'dynamic' acts beyond {length} tokens only; llama.cpp has "
        f"none like it, so the file ends at {length} tokens, and is equal up to there"
    ]


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """theta, type and the scaling's own numbers, from either spelling of config.json."""
    new = dict(config.get("rope_parameters") or {})
    old = dict(config.get("rope_scaling") or {})
    merged = {**old, **new}
    return {
        **merged,
        "theta": float(merged.get("rope_theta", config.get("rope_theta", 10000.0))),
        "type": merged.get("rope_type", merged.get("type", "default")) or "default",
        "original_max_position_embeddings": merged.get(
            "original_max_position_embeddings", config.get("max_position_embeddings")
        ),
    }


def gguf_tensors(
    files: WeightFiles, config: dict[str, Any], arch: str
) -> Iterator[tuple[str, str, Tensor]]:
    """(name in GGUF, name in the model, tensor) of each weight.

    Raises:
        ExportError: a tensor that llama.cpp has no name for, or one that is missing.
    """
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], config["num_hidden_layers"])
    heads, kv_heads, _ = _heads(config)
    tied = bool(config.get("tie_word_embeddings", False))
    for name in files.infos:
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"llama.cpp's {arch!r} has no place for the tensor {name}")
        tensor = files.read(name)
        if arch == "llama" and (found := re.search(r"\.([qk])_proj\.(weight|bias)$", name)):
            tensor = _interleave(tensor, heads if found[1] == "q" else kv_heads)
        yield target, name, tensor
    rope = rope_settings(config)
    if rope["type"] == "llama3":
        yield "rope_freqs.weight", "", llama3_factors(rope, _heads(config)[2])


def stored_type(shape: tuple[int, ...], outtype: str) -> Any:
    """GGML type of a tensor: vectors stay float32, rows that do not fit blocks become float16."""
    import gguf

    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if outtype not in ("f32", "f16", "bf16") and shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[outtype.upper()]


def quantised(tensor: Tensor, outtype: str) -> np.ndarray:
    """The data of a tensor as the file holds it."""
    import gguf

    return gguf.quants.quantize(tensor.float().numpy(), stored_type(tuple(tensor.shape), outtype))


def add_info(writer: Any, name: str, shape: tuple[int, ...], outtype: str) -> None:
    """Announces a tensor to the writer, before any data is written."""
    import gguf

    kind = stored_type(shape, outtype)
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    dtype = np.dtype(plain.get(kind, np.uint8))
    stored = shape if kind in plain else gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, dtype, math.prod(stored) * dtype.itemsize, raw_dtype=kind)


def rounded(tensor: Tensor, outtype: str) -> Tensor:
    """float32: what a tensor is after it went into GGUF and out again."""
    import gguf

    kind = stored_type(tuple(tensor.shape), outtype)
    numbers = gguf.quants.dequantize(quantised(tensor, outtype), kind)
    return torch.from_numpy(np.array(numbers)).reshape(tensor.shape)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: what Llama 3.1 divides each rotary frequency by.

    Slow frequencies by ``factor``, fast ones by 1, between them a blend (transformers'
    ``_compute_llama3_parameters``).
    """
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["theta"] ** (index / head_dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(float(factor))
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """(query heads, key-value heads, numbers of a head)."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return heads, kv_heads, config.get("head_dim") or config["hidden_size"] // heads


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, each rotary pair side by side as llama.cpp's llama has it.

    Hugging Face keeps the first halves of all pairs, then the second halves.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()
