"""The folders an export reads: base models, adapters, checkpoints, and what is copied from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.engine.checkpoint import list_checkpoints
from xtuner_lite.export.publish import ExportError
from xtuner_lite.models.hub import ADAPTER_CONFIG, MODEL_CONFIG, Hub, resolve_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template*", "*.tiktoken", "spiece.model", "sentencepiece*.model",
)  # fmt: skip
_ALONGSIDE = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def newest_checkpoint(path: str | Path) -> str:
    """The newest checkpoint of a run's work_dir; any other path as it is.

    Raises:
        ExportError: a work_dir without a finished checkpoint.
    """
    folder = Path(path).expanduser()
    if not (folder / "checkpoints").is_dir():
        return str(path)
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ExportError(f"{folder} is a work_dir without a finished checkpoint; train first")
    return str(checkpoints[-1])


def model_folder(path: str | Path, *, hub: Hub = "huggingface") -> Path:
    """The local folder of a whole model; fetched when it is an id.

    Raises:
        ExportError: there is no such model, or it is an adapter.
    """
    try:
        folder = resolve_model_path(newest_checkpoint(path), hub=hub)
    except (FileNotFoundError, NotADirectoryError, ValueError, ImportError) as error:
        raise ExportError(str(error)) from error
    if not (folder / MODEL_CONFIG).is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise ExportError(
            f"{folder} holds an adapter, not a model; merge it into its base model first: "
            "xtuner-lite convert merge BASE ADAPTER OUT"
        )
    return folder


def adapter_folder(path: str | Path) -> Path:
    """The local folder of an adapter.

    Raises:
        ExportError: it holds none, or one without weights in safetensors form.
    """
    folder = Path(newest_checkpoint(path)).expanduser()
    if not folder.is_dir():
        raise ExportError(
            f"no adapter folder {str(path)!r}; give the folder an adapter is saved in"
        )
    if not (folder / ADAPTER_CONFIG).is_file():
        what = "a whole model" if (folder / MODEL_CONFIG).is_file() else "no adapter"
        raise ExportError(
            f"{folder} holds {what} ({ADAPTER_CONFIG} is not there); give the folder an adapter is "
            "saved in: a checkpoint of a run is one"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        others = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {others[0]} is pickled and not opened" if others else ""
        raise ExportError(
            f"{folder} holds an adapter without weights: {ADAPTER_WEIGHTS} is not there{hint}. "
            "Save the adapter again with safetensors"
        )
    return folder.resolve()


def named_base(adapter: Path) -> str:
    """The base model an adapter names.

    Raises:
        ExportError: it names none.
    """
    name = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise ExportError(f"{adapter / ADAPTER_CONFIG} names no base model; give it as BASE")
    return str(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ExportError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ExportError(f"{path} is damaged: {error}; fetch or copy it again") from error
    return content


def refuse_quantised(folder: Path, purpose: str) -> None:
    """Raises ExportError for a folder whose weights are quantised."""
    method = read_json(folder / MODEL_CONFIG).get("quantization_config")
    if method:
        kind = method.get("quant_method", "") if isinstance(method, dict) else ""
        raise ExportError(
            f"{folder} is quantised{f' ({kind})' if kind else ''}, and {purpose} needs the "
            "full-precision model it was made from; give that (an adapter trained on 4 or 8 bits "
            "merges into the full-precision base)"
        )


def tokenizer_folder(*folders: Path) -> Path | None:
    """The first folder that holds a tokenizer."""
    for folder in folders:
        if any((folder / n).is_file() for n in ("tokenizer_config.json", "tokenizer.json")):
            return folder
    return None


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies the tokenizer's files, byte for byte; returns their names."""
    names = []
    for pattern in _TOKENIZER_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in names:
                shutil.copyfile(path, target / path.name)
                names.append(path.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")
    return names


def copy_alongside(source: Path, target: Path, *, code: bool = False) -> None:
    """Copies licences, and modeling code that the config refers to."""
    for pattern in (*_ALONGSIDE, *(("*.py",) if code else ())):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def write_generation_config(
    target: Path, sources: tuple[Path, ...], stops: list[int], pad: int | None
) -> None:
    """Writes generation_config.json: the first source's, stopping where the template says."""
    settings: dict[str, Any] = {}
    for source in sources:
        if (source / GENERATION_CONFIG).is_file():
            settings = read_json(source / GENERATION_CONFIG)
            break
    own = settings.get("eos_token_id")
    own = [own] if isinstance(own, int) else list(own or [])
    stops = list(dict.fromkeys([*stops, *own]))
    if stops:
        settings["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    if settings.get("pad_token_id") is None and pad is not None:
        settings["pad_token_id"] = pad
    text = json.dumps(settings, indent=2) + "\n"
    (target / GENERATION_CONFIG).write_text(text, encoding="utf-8")


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, offline and without running its code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
