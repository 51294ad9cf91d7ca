"""A model folder written tensor by tensor, with its settings and tokenizer, then checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from xtuner_lite.export.publish import ExportError, Receipt
from xtuner_lite.export.sources import (
    copy_alongside,
    copy_tokenizer,
    open_tokenizer,
    read_json,
    tokenizer_folder,
    write_generation_config,
)
from xtuner_lite.export.streamed_model import build_empty, stream_weights
from xtuner_lite.export.tensor_files import (
    TensorInfo,
    WeightFiles,
    plan_shards,
    shard_names,
    write_index,
    write_tensors,
)
from xtuner_lite.export.verify import (
    TOLERANCE,
    Answers,
    CachedForward,
    Forward,
    check_stops,
    check_tokenizer,
    compare,
    greedy_answers,
    prompt_ids,
)
from xtuner_lite.models.hub import MODEL_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Verify = Literal["auto", "loaded", "streamed", "none"]
VERIFY = ("auto", "loaded", "streamed", "none")
NUM_NEW_TOKENS = {"loaded": 16, "streamed": 4}
_MAX_LOADED_BYTES = 1 << 30  # of the files; twice that in float32, on both sides in turn


@dataclass
class Tokenizer:
    """The tokenizer an export takes along.

    Args:
        folder: where it lies; None where there is none.
        own: the tokenizer in it.
        stops: ids at which generation ends.
    """

    folder: Path | None
    own: PreTrainedTokenizerBase | None
    stops: list[int]

    @classmethod
    def found_in(cls, *folders: Path) -> Tokenizer:
        """The first of the folders' tokenizers."""
        from xtuner_lite.templates import stop_token_ids

        folder = tokenizer_folder(*folders)
        if folder is None:
            return cls(None, None, [])
        own = open_tokenizer(folder)
        return cls(folder, own, stop_token_ids(own))


def check_verify(verify: str) -> None:
    """Raises ExportError for an unknown way of verifying."""
    if verify not in VERIFY:
        raise ExportError(f"verify is {verify!r}; allowed: {', '.join(VERIFY)}")


def chosen_verify(verify: Verify, num_bytes: int) -> Verify:
    """'auto' as 'loaded' for a small model, 'streamed' for a large one."""
    if verify != "auto":
        return verify
    return "loaded" if num_bytes <= _MAX_LOADED_BYTES else "streamed"


def write_weights(
    folder: Path, infos: Iterable[TensorInfo], read: Callable[[str], Tensor], max_bytes: int
) -> None:
    """Writes model.safetensors, or shards with their index, one tensor in memory at a time."""
    shards = plan_shards(infos, max_bytes)
    for shard, name in zip(shards, shard_names(len(shards)), strict=True):
        write_tensors(folder / name, shard, (read(info.name) for info in shard))
    write_index(folder, shards)


def write_settings(
    folder: Path, source: Path, tokenizer: Tokenizer, changes: dict[str, Any], *extra: Path
) -> None:
    """Writes config.json, generation_config.json, tokenizer files and licences.

    Args:
        folder: the export.
        source: the model folder they come from.
        tokenizer: what is copied, and what the generation config stops at.
        changes: keys of config.json.
        extra: folders whose generation_config.json goes before the source's.
    """
    config = {**read_json(source / MODEL_CONFIG), **changes}
    text = json.dumps(config, indent=2) + "\n"
    (folder / MODEL_CONFIG).write_text(text, encoding="utf-8")
    copy_alongside(source, folder, code="auto_map" in config)
    if tokenizer.folder is not None:
        copy_tokenizer(tokenizer.folder, folder)
    pad = tokenizer.own.pad_token_id if tokenizer.own is not None else None
    write_generation_config(folder, (*extra, source), tokenizer.stops, pad)


def uncached(model: nn.Module) -> Forward:
    """Logits of a model's own forward pass; neither mask nor cache."""

    def forward(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    return forward


def open_folder(folder: Path, how: Verify) -> Forward:
    """A model folder in float32: loaded by transformers, or streamed from its files."""
    if how == "loaded":
        from xtuner_lite.models.loading import load_causal_lm

        return CachedForward(load_causal_lm(folder, dtype="fp32").eval())
    from transformers import AutoConfig

    files = WeightFiles.of_model(folder)
    assert files is not None
    model = build_empty(AutoConfig.from_pretrained(str(folder), local_files_only=True))
    tied = _name_of(model, model.get_input_embeddings())
    head = _name_of(model, model.get_output_embeddings())

    def read(name: str) -> Tensor | None:
        if name not in files.infos and name == head:
            name = tied
        return files.read(name) if name in files.infos else None

    stream_weights(model, read)
    return uncached(model)


def ask(
    open_reference: Callable[[], Forward], tokenizer: Tokenizer, vocab_size: int, how: Verify
) -> Answers | None:
    """What the source answers; None with verify='none'."""
    if how == "none":
        return None
    prompts = prompt_ids(tokenizer.own, vocab_size)
    return greedy_answers(open_reference(), prompts, NUM_NEW_TOKENS[how])


def verify_folder(
    folder: Path,
    receipt: Receipt,
    reference: Answers | None,
    tokenizer: Tokenizer,
    how: Verify,
    tolerance: float | None = None,
) -> None:
    """Compares a written folder with its source; puts what was found into the receipt.

    Raises:
        ExportError: it is beyond the tolerance.
    """
    receipt.verification = {"how": how}
    if tokenizer.folder is not None:
        exported = open_tokenizer(folder)
        receipt.verification["tokenizer"] = check_tokenizer(tokenizer.own, exported)
        check_stops(folder, tokenizer.stops)
    if reference is None:
        receipt.notes.append("logits and tokens were not compared (--verify none)")
        return
    if tolerance is None:
        tolerance = TOLERANCE.get(main_dtype(folder), TOLERANCE[torch.bfloat16])
    found = compare(reference, open_folder(folder, how), tolerance)
    found.check()
    receipt.verification.update(
        prompts=reference.prompts, tokens=reference.tokens, **found.to_dict()
    )


def main_dtype(folder: Path) -> torch.dtype:
    """The floating-point type of most of a folder's numbers."""
    files = WeightFiles.of_model(folder)
    sizes: dict[torch.dtype, int] = {}
    for info in files.infos.values() if files is not None else ():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    if not sizes:
        raise ExportError(f"{folder} holds no floating-point weights in safetensors form")
    return max(sizes, key=lambda dtype: sizes[dtype])


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((f"{n}.weight" for n, m in model.named_modules() if m is module), "")
