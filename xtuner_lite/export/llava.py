"""A trained LLaVA as a folder for others: transformers' own form, or XTuner's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from xtuner_lite.export.llava_check import ImageAnswers, compare_answers, image_answers
from xtuner_lite.export.llava_xtuner import write_xtuner_folder
from xtuner_lite.export.publish import ExportError, Receipt, describe_folder, publishing
from xtuner_lite.export.sources import copy_tokenizer, newest_checkpoint, tokenizer_folder
from xtuner_lite.export.tensor_files import parse_size
from xtuner_lite.export.verify import TOLERANCE
from xtuner_lite.models.hub import LLAVA_JSON, MODEL_CONFIG, PROCESSOR_FILES, is_xtuner_llava
from xtuner_lite.models.llava_files import LlavaParts, is_llava_run
from xtuner_lite.models.llava_xtuner import open_xtuner_llava, read_parts
from xtuner_lite.models.modes import without_progress_bars
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.structures import DTYPE_NAMES

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

Form = Literal["hf", "xtuner"]
_LLAVA_TYPES = ("llava", "llava_mlp")


def export_llava(
    source: str | Path,
    out: str | Path,
    *,
    form: Form = "hf",
    dtype: str = "keep",
    llm: str | Path | None = None,
    visual_encoder: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> Receipt:
    """Writes what a LLaVA run trained, and compares it with the source on prompts with an image.

    The whole model is held in float32 once, and the written one beside it while they are compared.

    Args:
        source: a checkpoint of a LLaVA run or its work_dir; for 'hf' also a folder in XTuner's
            layout, whose other parts are then named by ``llm`` and ``visual_encoder``.
        out: the folder to make.
        form: 'hf': a whole LlavaForConditionalGeneration with adapters merged, tokenizer and
            processor; 'xtuner': projector/, llm_adapter/, visual_encoder_adapter/, and whole parts
            where they were trained in full.
        dtype: of an 'hf' folder: 'keep' takes the language model's; or 'bf16', 'fp16', 'fp32'.
        llm: where the language model lies now; None: where it lay.
        visual_encoder: the same of the vision tower.
        max_shard_size: '5GB' or bytes; of each weight file.
        overwrite: replace a model folder that lies there.

    Raises:
        ExportError: the source is no LLaVA, its projector has no such form, ``out`` is taken, or
            the result does not answer like the source.
    """
    if form not in ("hf", "xtuner"):
        raise ExportError(f"form is {form!r}; allowed: 'hf', 'xtuner'")
    max_bytes = parse_size(max_shard_size)
    folder = Path(newest_checkpoint(source)).expanduser()
    if form == "xtuner" and is_xtuner_llava(folder):
        raise ExportError(f"{folder} is in XTuner's layout already: it needs no export")
    model, own_dtype = _open(folder, llm, visual_encoder)
    base = unwrap_adapter(model)
    depth = getattr(base.config, "projector_depth", 2)
    if form == "hf" and depth != 2:
        raise ExportError(
            f"the projector of {folder} has {depth} layer(s), and transformers' LLaVA has two, so "
            "it has no Hugging Face form; export it with --format xtuner, or open the folder with "
            "load_image_text_model"
        )
    to_dtype = own_dtype if dtype == "keep" else _dtype_of(dtype)
    answers = image_answers(model, folder)
    receipt = Receipt("llava", {}, {"form": form, "max_shard_size": max_bytes})
    with publishing(out, overwrite=overwrite, sources=(folder,)) as target:
        if form == "hf":
            receipt.options["dtype"] = str(to_dtype).removeprefix("torch.")
            _write_hf(model, target, to_dtype, max_bytes)
            if is_xtuner_llava(folder) and tokenizer_folder(folder) is None:
                _write_processor(target, read_parts(folder, llm, visual_encoder))
            else:
                _copy_tokenizer(folder, target)
            open_again: Callable[[], Any] = lambda: _open_plain(target)  # noqa: E731
            tolerance = TOLERANCE[to_dtype]
        else:
            write_xtuner_folder(model, target, folder, max_bytes)
            _copy_tokenizer(folder, target)
            others = _other_parts(folder, target, llm, visual_encoder)
            open_again = lambda: open_xtuner_llava(target, dtype="fp32", **others)  # noqa: E731
            tolerance = TOLERANCE[torch.float32]
        del model, base  # only its answers are needed beside the written one
        _check(answers, open_again, tolerance, receipt)
        receipt.inputs = {"run": describe_folder(source, folder)}
        receipt.write(target)
    return receipt


def _open(
    folder: Path, llm: str | Path | None, visual_encoder: str | Path | None
) -> tuple[Any, torch.dtype]:
    """The model in float32 with its adapter on it, and the dtype that its parts have on disk."""
    from transformers import AutoConfig

    from xtuner_lite.models.hub import resolve_model_path
    from xtuner_lite.models.image_text import load_image_text_model

    of_parts = is_llava_run(folder) or is_xtuner_llava(folder)
    if not of_parts and not (folder / MODEL_CONFIG).is_file():
        raise ExportError(
            f"{folder} holds no LLaVA: neither {LLAVA_JSON} nor {MODEL_CONFIG} is there; give a "
            "checkpoint of a LLaVA run or its work_dir, or a folder in XTuner's layout"
        )
    try:
        if of_parts:
            parts = dict(llm=llm, visual_encoder=visual_encoder)
            found = LlavaParts.read(folder) if is_llava_run(folder) else read_parts(folder, **parts)
            place = resolve_model_path(llm or found.llm)
            config = AutoConfig.from_pretrained(str(place))
        else:
            parts = {}
            config = AutoConfig.from_pretrained(str(folder))
            if config.model_type not in _LLAVA_TYPES:
                raise ExportError(
                    f"{folder} holds a {config.model_type!r} model, which has Hugging Face's form "
                    "already: it needs no export"
                )
        model = load_image_text_model(folder, dtype="fp32", **parts)
    except (FileNotFoundError, ValueError) as error:
        raise ExportError(str(error)) from error
    return model.eval(), config.dtype or torch.float32


def _write_hf(model: Any, target: Path, dtype: torch.dtype, max_bytes: int) -> None:
    merged: LlavaForConditionalGeneration = model
    if hasattr(model, "peft_config"):
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except (NotImplementedError, AttributeError) as error:
            kind = type(model.peft_config["default"]).__name__
            raise ExportError(
                f"peft cannot merge a {kind}, so this LLaVA has no form without its adapter; open "
                "its folder with load_image_text_model"
            ) from error
    config = merged.config
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    with without_progress_bars():
        merged.to(dtype).save_pretrained(str(target), max_shard_size=max_bytes)


def _other_parts(
    source: Path, target: Path, llm: str | Path | None, visual_encoder: str | Path | None
) -> dict[str, str | Path]:
    """Where the parts lie that an export in XTuner's layout does not hold."""
    if not is_llava_run(source):
        return {}
    parts = LlavaParts.read(source)
    found = {"llm": llm or parts.llm, "visual_encoder": visual_encoder or parts.visual_encoder}
    return {name: place for name, place in found.items() if not (target / name).is_dir()}


def _write_processor(target: Path, parts: LlavaParts) -> None:
    """Tokenizer and processor of a LLaVA that came without."""
    from xtuner_lite.images.vision_inputs import save_tokenizer
    from xtuner_lite.models.processors import load_llava_processor

    strategy = parts.visual_select_strategy
    tokenizer = load_llava_processor(
        parts.llm, parts.visual_encoder, visual_select_strategy=strategy
    )
    save_tokenizer(tokenizer, target)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Tokenizer, template and processor, byte for byte."""
    if tokenizer_folder(source) is not None:
        copy_tokenizer(source, target)
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _open_plain(folder: Path) -> Any:
    """As anybody opens it: transformers alone."""
    from transformers import AutoModelForImageTextToText

    with without_progress_bars():
        return AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True
        ).eval()


def _check(
    answers: ImageAnswers, open_again: Callable[[], Any], tolerance: float, receipt: Receipt
) -> None:
    found = compare_answers(answers, open_again(), tolerance)
    found.check()
    receipt.verification = {"how": "loaded, with an image", **found.to_dict()}
    if not answers.has_processor:
        receipt.notes.append(
            "the run's folder holds no processor: the image of the check was random numbers, and "
            "the export cannot turn pictures into inputs by itself"
        )


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, DTYPE_NAMES.get(name, name), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ExportError(f"dtype is {name!r}; allowed: 'keep', 'bf16', 'fp16', 'fp32'")
    return dtype
