"""New tokens: rows for them in the embeddings, trained, and found again when a model is opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ATTRIBUTE = "pieces_of_new_tokens"


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Adds tokens that are found in text before anything else and stay visible when decoded.

    Args:
        tokenizer: changed in place; remembers which ids are new, and as which pieces it would have
            read each of them before.
        tokens: texts; none may be a token already.

    Raises:
        ValueError: a token is empty or one the tokenizer has.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if not token.strip() or token in vocabulary:
            why = "is in the vocabulary already" if token in vocabulary else "is empty"
            raise ValueError(f"new_tokens: {token!r} {why}; take it out of the list")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in dict.fromkeys(tokens)])
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    setattr(tokenizer, _ATTRIBUTE, dict(zip(ids, pieces)))


def new_token_ids(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Ids of the tokens that :func:`add_new_tokens` added, ascending; [] for none."""
    return sorted(getattr(tokenizer, _ATTRIBUTE, {}))


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Gives each new token a row: the mean of the rows of the pieces it was read as before.

    Embeddings grow only where they have no spare rows; nothing happens without new tokens.
    """
    import torch

    pieces = getattr(tokenizer, _ATTRIBUTE, {})
    if not pieces:
        return
    grow_embeddings(model, max(pieces) + 1)
    tables = {id(t): t for t in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = {id(t.weight): t.weight for t in tables.values() if t is not None}  # tied: one
    with torch.no_grad():
        for weight in weights.values():
            for index, before in pieces.items():
                weight[index] = weight[before].float().mean(0).to(weight.dtype)


def grow_embeddings(model: PreTrainedModel, num_rows: int) -> None:
    """At least ``num_rows`` rows in the input and output embeddings; never fewer than before."""
    # A vision tower has no table, and needs none.
    if num_rows and model.get_input_embeddings().num_embeddings < num_rows:
        model.resize_token_embeddings(num_rows, mean_resizing=False)


def train_new_rows(model: PreTrainedModel, config: PeftConfig, new_ids: Sequence[int]) -> None:
    """Makes an adapter train the rows of new tokens too, unless it trains whole embeddings.

    Sets ``config.trainable_token_indices``, so that only these rows are trained and saved.

    Raises:
        ValueError: this adapter type cannot train single rows, and modules_to_save does not name
            the embeddings.
    """
    names = embedding_names(model)
    saved = set(getattr(config, "modules_to_save", None) or [])
    if not new_ids or saved.issuperset(names):
        return
    if not hasattr(config, "trainable_token_indices"):
        raise ValueError(
            f"the tokenizer has {len(new_ids)} new tokens, whose rows {type(config).__name__} "
            f"cannot train by themselves: give lora modules_to_save={names}, or use LoraConfig"
        )
    given = config.trainable_token_indices or {}
    if not isinstance(given, dict):
        given = {names[0]: list(given)}
    config.trainable_token_indices = {
        name: sorted({*given.get(name, []), *new_ids}) for name in [*names, *given]
    }


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Module names of the input embeddings and, where it is not tied to them, of the head."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tables[1] is None or tables[1].weight is tables[0].weight:
        tables = tables[:1]
    return [
        next(name for name, module in model.named_modules() if module is table).rpartition(".")[2]
        for table in tables
    ]


def rows_of_adapter(folder: Path, model: PreTrainedModel) -> int:
    """Rows that a saved adapter needs in the embeddings of ``model``; 0 where it has none."""
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    indices = config.get("trainable_token_indices") or config.get("token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    rows = 1 + max((index for ids in lists for index in ids), default=-1)
    file = folder / "adapter_model.safetensors"
    names = config.get("modules_to_save") or []
    if names and file.is_file():
        with safe_open(str(file), framework="pt") as tensors:
            endings = tuple(f".{name}.weight" for name in embedding_names(model))
            for key in tensors.keys():  # noqa: SIM118  (no dict)
                if key.endswith(endings):
                    rows = max(rows, tensors.get_slice(key).get_shape()[0])
    return rows
