"""A Hugging Face tokenizer in GGUF: tokens, merges or scores, special tokens, template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.export.publish import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TYPES = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}


def add_tokenizer(
    writer: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Writes the tokenizer of a folder.

    Args:
        writer: a GGUFWriter.
        folder: with tokenizer.json.
        tokenizer: the one in it.
        vocab_size: rows of the embedding; tokens beyond the tokenizer's become unused ones.

    Raises:
        ExportError: a kind of tokenizer that llama.cpp cannot be told about.
    """
    state = _state(folder, tokenizer)
    model = state["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"the tokenizer is a {model['type']} model; GGUF is written for BPE tokenizers (byte "
            "level, or sentencepiece's with byte fallback)"
        )
    is_sentencepiece = bool(model.get("byte_fallback"))
    texts, types = _tokens(state, tokenizer, vocab_size)
    writer.add_tokenizer_model("llama" if is_sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if is_sentencepiece else pre_tokenizer_name(state))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if is_sentencepiece:
        writer.add_token_scores(_scores(model, texts))
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_token_merges(_merges(model))
    _add_special(writer, tokenizer)


def pre_tokenizer_name(state: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text into words.

    Raises:
        ExportError: none of the names known here cuts like it.
    """
    if state.get("normalizer") and state["normalizer"].get("type") != "NFC":
        raise ExportError(
            f"the tokenizer's normalizer {state['normalizer']['type']} is not written"
        )
    top = state.get("pre_tokenizer") or {}
    steps = top["pretokenizers"] if top.get("type") == "Sequence" else [top]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            pattern = steps[0]["pattern"].get("Regex", "")
            if pattern == _LLAMA3:
                return "llama-bpe"
            if pattern == _QWEN2:
                return "qwen2"
    raise ExportError(
        "llama.cpp would cut text into other words than this tokenizer: its pre-tokenizer is "
        f"{json.dumps(top)[:200]}. Known: GPT-2's, SmolLM's, Llama 3's and Qwen2's"
    )


def _state(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if (folder / "tokenizer.json").is_file():
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if getattr(tokenizer, "is_fast", False):
        return json.loads(tokenizer.backend_tokenizer.to_str())
    raise ExportError(
        f"{folder} has no tokenizer.json; open it once with AutoTokenizer and save_pretrained"
    )


def _tokens(
    state: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[list[str], list[int]]:
    """Text and type of each id."""
    is_sentencepiece = bool(state["model"].get("byte_fallback"))
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_TYPES["unused"]] * vocab_size
    for text, index in state["model"]["vocab"].items():
        texts[index] = text
        is_byte = is_sentencepiece and len(text) == 6 and text.startswith("<0x")
        types[index] = _TYPES["byte" if is_byte else "normal"]
    for token in state.get("added_tokens", []):
        index = token["id"]
        if index >= vocab_size:
            raise ExportError(
                f"token {token['content']!r} has id {index}, the model {vocab_size} embeddings"
            )
        texts[index] = token["content"]
        types[index] = _TYPES["control" if token["special"] else "user"]
    if is_sentencepiece and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = _TYPES["unknown"]
    if len(set(texts)) != len(texts):
        raise ExportError("two ids of the tokenizer have the same text; llama.cpp needs them apart")
    return texts, types


def _merges(model: dict[str, Any]) -> list[str]:
    return [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def _scores(model: dict[str, Any], texts: list[str]) -> list[float]:
    """sentencepiece's order of merging: a token scores by the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(model)):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks[text]) if text in ranks else -1e6 for text in texts]


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    text = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    return (
        '"Prepend"' in text
        or '"prepend_scheme": "first"' in text
        or ('"prepend_scheme": "always"' in text)
    )


def _add_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    from xtuner_lite.templates import stop_token_ids

    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    stops = [i for i in stop_token_ids(tokenizer) if i != tokenizer.eos_token_id]
    if stops:
        writer.add_eot_token_id(stops[0])
    ids = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)
