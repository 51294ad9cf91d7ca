"""The architecture of InternLM2 and InternLM2.5 in terms of Llama's: names, memory layout, config.

The two compute the same; they differ in names and in how the attention's input projections lie in
memory. ``attention.wqkv`` is [kv_heads, groups + 2, head_dim, hidden]: for each key-value head its
``groups`` query heads, then the key head, then the value head. Folders are converted in
internlm2_files.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from xtuner_lite.models.shards import WeightFiles

_TOP = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "model.norm.": "model.norm.",
    "output.": "lm_head.",
}
_IN_LAYER = {
    "attention.wo.": "self_attn.o_proj.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    "attention_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
}
_WQKV = "attention.wqkv."
_QKV = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_BUFFER = re.compile(r"rotary_emb\.")  # computed, never learnt
#: Keys of the config that mean the same in both.
SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "rope_theta", "rope_scaling", "torch_dtype", "dtype",
)  # fmt: skip


def to_llama_config(config: dict[str, Any], where: str = "the config") -> dict[str, Any]:
    """A Llama config.json, in keys that transformers 4 and 5 and the servers read.

    Raises:
        ValueError: a rope scaling other than dynamic NTK or linear, or a key is missing.
    """
    if missing := [key for key in SHARED_KEYS[:5] if key not in config]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; fetch the folder again")
    llama = {key: config[key] for key in SHARED_KEYS if key in config}
    llama.setdefault("num_key_value_heads", None)
    if llama["num_key_value_heads"] is None:
        llama["num_key_value_heads"] = config["num_attention_heads"]
    llama.setdefault("rope_theta", 10000.0)
    llama.setdefault("tie_word_embeddings", False)
    llama.setdefault("hidden_act", "silu")
    llama.setdefault("rms_norm_eps", 1e-6)
    llama.setdefault("max_position_embeddings", 2048)
    scaling = llama.pop("rope_scaling", None)
    if scaling:
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in ("dynamic", "linear"):
            raise ValueError(f"{where}: rope_scaling is {scaling}; known types: dynamic, linear")
        factor = float(scaling["factor"])
        llama["rope_scaling"] = {"rope_type": kind, "type": kind, "factor": factor}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **llama,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "attention_bias": config.get("bias", True),
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
    }


def to_internlm2_config(llama: dict[str, Any], where: str = "the config") -> dict[str, Any]:
    """The keys of an InternLM2 config.json that a Llama one decides.

    Raises:
        ValueError: no Llama config, or one with what InternLM2 has no place for.
    """
    heads = llama.get("num_attention_heads", 1)
    wrong = {
        "model_type": llama.get("model_type") != "llama",
        "mlp_bias": bool(llama.get("mlp_bias")),
        "head_dim": llama.get("head_dim") not in (None, llama.get("hidden_size", 0) // heads),
    }
    if any(wrong.values()):
        found = {key: llama.get(key) for key, is_wrong in wrong.items() if is_wrong}
        raise ValueError(
            f"{where} has {found}, which InternLM2's layout has no place for; give a Llama model "
            "that was converted from InternLM2"
        )
    config = {key: llama[key] for key in SHARED_KEYS if key in llama}
    rope = dict(llama.get("rope_parameters") or llama.get("rope_scaling") or {})
    config["rope_theta"] = rope.pop("rope_theta", llama.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    config["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
    return config | {"bias": llama.get("attention_bias", False)}


def split_wqkv(wqkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value rows of the packed projection.

    Args:
        wqkv: weight [kv_heads * (groups + 2) * head_dim, hidden], or bias without ``hidden``.
        num_heads: query heads, a multiple of num_kv_heads.
        num_kv_heads: key-value heads.

    Returns:
        [heads * head_dim, ...], [kv_heads * head_dim, ...] and the same again.
    """
    groups = num_heads // num_kv_heads
    head_dim = wqkv.shape[0] // (num_kv_heads * (groups + 2))
    parts = wqkv.unflatten(0, (num_kv_heads, groups + 2, head_dim))
    return tuple(p.flatten(0, 2) for p in parts.split([groups, 1, 1], dim=1))


def join_wqkv(query: Tensor, key: Tensor, value: Tensor, num_kv_heads: int) -> Tensor:
    """The packed projection of three: the inverse of :func:`split_wqkv`."""
    import torch

    head_dim = key.shape[0] // num_kv_heads
    parts = [p.unflatten(0, (num_kv_heads, -1, head_dim)) for p in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def llama_tensors(files: WeightFiles, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a checked InternLM2 folder in Llama's names and layout, one at a time."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config["hidden_size"] // heads
    for name in files.names:
        if _BUFFER.search(name) or (name == "output.weight" and config.get("tie_word_embeddings")):
            continue
        tensor = files.get(name)
        if _WQKV in name:
            rows = (heads + 2 * kv_heads) * head_dim
            if tensor.shape[0] != rows:
                raise ValueError(
                    f"{name} has {tensor.shape[0]} rows, the config asks for {rows} ({heads} + 2 x "
                    f"{kv_heads} heads of {head_dim}); the config belongs to another model"
                )
            parts = split_wqkv(tensor, heads, kv_heads)
            yield from ((name.replace(_WQKV, to), part) for to, part in zip(_QKV, parts))
        else:
            yield _llama_name(name), tensor


def internlm2_tensors(files: WeightFiles, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a Llama folder in InternLM2's names and layout: the way back."""
    back = {new: old for old, new in (_TOP | _IN_LAYER).items()}
    for name in files.names:
        if _QKV[0] in name:
            parts = [files.get(name.replace(_QKV[0], other)) for other in _QKV]
            yield name.replace(_QKV[0], _WQKV), join_wqkv(*parts, config["num_key_value_heads"])
        elif not any(other in name for other in _QKV):
            new = next((key for key in back if key in name), None)
            if new is None:
                raise ValueError(f"{files.folder}: InternLM2 has no place for {name}")
            yield name.replace(new, back[new]), files.get(name)


def _llama_name(name: str) -> str | None:
    """A tensor's name in Llama; None where Llama has no such tensor."""
    layer = _LAYER.fullmatch(name)
    prefix, rest, table = (*layer.groups(), _IN_LAYER) if layer else ("", name, _TOP)
    for old, new in table.items():
        if rest in (old + "weight", old + "bias"):
            return prefix + new + rest[len(old) :]
    return None


def check_names(files: WeightFiles, config: dict[str, Any]) -> None:
    """Raises ValueError that names tensors which Llama has no place for, or which are missing."""
    kinds = ["weight", "bias"] if config.get("bias", True) else ["weight"]
    expected = {key + "weight" for key in _TOP}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        expected |= {layer + key + "weight" for key in _IN_LAYER}
        expected |= {layer + key + kind for key in (_WQKV, "attention.wo.") for kind in kinds}
    found = {name for name in files.names if not _BUFFER.search(name)}
    if config.get("tie_word_embeddings"):
        expected.discard("output.weight")
        found.discard("output.weight")
    problems = [
        f"{what}: {', '.join(sorted(names)[:3])}" + (" ..." if len(names) > 3 else "")
        for what, names in (("missing", expected - found), ("unknown", found - expected))
        if names
    ]
    if problems:
        raise ValueError(
            f"{files.folder} is no InternLM2 language model as published "
            f"({'; '.join(problems)}); a reward or a multimodal model is not one"
        )
