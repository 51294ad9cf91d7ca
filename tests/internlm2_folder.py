"""A small InternLM2 checkpoint in the layout it is published in, written from its description."""

from __future__ import annotations

import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = (
    "Who are you? I am a small helper, trained to answer questions.",
    "你是谁？我是一个小助手，很高兴认识你。",
    "The capital of France is Paris. 法国的首都是巴黎。",
    "user assistant system\n12345 67890  two  spaces\tand a tab",
    "今天天气怎么样？It is sunny, 明天可能下雨。",
)
NAMED = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>",
         "<|im_start|>")  # fmt: skip
CONFIG = {
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "attn_implementation": "eager",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "model_type": "internlm2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.0",
    "use_cache": True,
}


@cache
def spm_bytes(
    *, add_dummy_prefix: bool = False, remove_extra_whitespaces: bool = False, num_pieces: int = 0
) -> bytes:
    """A BPE sentencepiece model with byte fallback, the last 147 pieces free, as in InternLM2.

    ``num_pieces``: the vocabulary is filled up to this size before the free pieces' end.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=out, vocab_size=460, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        add_dummy_prefix=add_dummy_prefix, remove_extra_whitespaces=remove_extra_whitespaces,
        split_digits=True, minloglevel=2,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(out.getvalue())
    for index in range(len(proto.pieces), num_pieces - 147):
        proto.pieces.add(piece=f"<filler_{index}>", score=0.0, type=6)  # a byte piece: never made
    for index in range(147):
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{index}]", score=0.0, type=4)  # user-defined
    return proto.SerializeToString()


def write_internlm2_folder(
    folder: Path,
    *,
    pickled: bool = False,
    shards: int = 2,
    seed: int = 0,
    num_pieces: int = 0,
    has_template: bool = True,
    **config: Any,
) -> dict[str, Tensor]:
    """Writes config, weights, tokenizer and generation config; returns the weights."""
    import torch
    from safetensors.torch import save_file

    spm = spm_bytes(num_pieces=num_pieces)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(spm)
    vocab_size = _num_pieces(spm)
    config = {**CONFIG, "vocab_size": vocab_size, **config}
    _write_json(folder / "config.json", config)
    tokens = dict(enumerate(("<unk>", "<s>", "</s>")))
    tokens |= {vocab_size - 6 + i: t for i, t in enumerate(NAMED)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
             "special": True}  # fmt: skip
    settings = {
        "added_tokens_decoder": {str(i): {"content": t, **flags} for i, t in tokens.items()},
        "additional_special_tokens": list(NAMED),
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "decode_with_prefix_space": False,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "InternLM2Tokenizer",
    }  # fmt: skip
    if has_template:
        settings["chat_template"] = (
            "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' "
            "+ message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": [2, vocab_size - 2], "pad_token_id": 2},
    )
    (folder / "modeling_internlm2.py").write_text("raise RuntimeError('remote code ran')\n")
    weights = _random_weights(config, seed)
    ending = "bin" if pickled else "safetensors"
    stem = "pytorch_model" if pickled else "model"
    names = sorted(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: weights[name] for name in names[shard::shards]}
        weight_map |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, str(folder / file), metadata={"format": "pt"})
    _write_json(folder / f"{stem}.{ending}.index.json", {"weight_map": weight_map})
    return weights


def _random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    packed = (heads + 2 * kv_heads) * (hidden // heads)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    weights = {
        "model.tok_embeddings.weight": draw(vocab, hidden),
        "model.norm.weight": 1 + draw(hidden),
        "output.weight": draw(vocab, hidden),
    }
    if config["tie_word_embeddings"]:
        del weights["output.weight"]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        weights |= {
            layer + "attention.wqkv.weight": draw(packed, hidden),
            layer + "attention.wo.weight": draw(hidden, hidden),
            layer + "feed_forward.w1.weight": draw(inner, hidden),
            layer + "feed_forward.w3.weight": draw(inner, hidden),
            layer + "feed_forward.w2.weight": draw(hidden, inner),
            layer + "attention_norm.weight": 1 + draw(hidden),
            layer + "ffn_norm.weight": 1 + draw(hidden),
        }
        if config["bias"]:
            weights |= {
                layer + "attention.wqkv.bias": draw(packed),
                layer + "attention.wo.bias": draw(hidden),
            }
    return weights


def _num_pieces(spm: bytes) -> int:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(spm)
    return len(proto.pieces)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
