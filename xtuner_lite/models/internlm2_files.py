"""InternLM2 and InternLM2.5 folders, as published, written in the form of Llama and back.

In the form of Llama a model is loaded, trained, served and exported without the code that comes
with it (which fails under transformers 5).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.home import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECEIPT = "xtuner_lite_source.json"
_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPM_FILE = "tokenizer.model"
_WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")


def has_internlm2_layout(folder: Path) -> bool:
    """Whether a model folder holds an InternLM2 model as published."""
    try:
        config = _read_json(folder / _CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "internlm2"


def llama_form(folder: Path) -> Path:
    """The Llama form of an InternLM2 folder, made in the cache on first use.

    A changed source gets a form of its own. Safe with several processes at once.

    Raises:
        ValueError: see :func:`convert_internlm2`.
    """
    from filelock import FileLock

    in_hub_cache = folder.parent.name == "snapshots"  # models--owner--name/snapshots/revision
    name = folder.parent.parent.name.rpartition("--")[2] if in_hub_cache else folder.name
    target = cache_dir() / "models" / f"{name}-llama-{_digest(folder)}"
    if (target / RECEIPT).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / RECEIPT).is_file():
            convert_internlm2(folder, target)
    return target


def convert_internlm2(source: str | Path, target: str | Path) -> Path:
    """Writes an InternLM2 folder in the form of Llama: weights, configs, a fast tokenizer.

    Shard by shard, in the dtype of the source; whatever opens a Llama folder opens the result.
    It is written aside and renamed, so no half folder is left. Pickled shards are read as tensors
    only; no code in ``source`` runs.

    Args:
        source: the published folder, safetensors or ``.bin``.
        target: made here; must not hold anything.

    Returns:
        The folder written.

    Raises:
        FileExistsError: ``target`` is not empty.
        ValueError: ``source`` is no InternLM2 language model, or has a setting or a tensor that
            Llama has no place for, or lacks one.
    """
    from xtuner_lite.models.internlm2 import check_names, llama_tensors, to_llama_config
    from xtuner_lite.models.internlm2_tokenizer import internlm2_tokenizer
    from xtuner_lite.models.shards import WeightFiles, write_shards

    source = Path(source).expanduser()
    if not has_internlm2_layout(source):
        raise ValueError(f"{source} is no InternLM2 folder as published; it needs no conversion")
    config = _read_json(source / _CONFIG)
    llama_config = to_llama_config(config, str(source / _CONFIG))
    with _written_aside(target) as aside:
        # Where weights alone were fetched, a tokenizer that is asked for says what is missing.
        tokenizer = internlm2_tokenizer(source) if (source / _SPM_FILE).is_file() else None
        with WeightFiles(source) as files:
            check_names(files, config)
            write_shards(llama_tensors(files, config), aside)
        _write_json(aside / _CONFIG, llama_config)
        _write_generation_config(source, aside, llama_config, tokenizer)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, aside)
            shutil.copyfile(source / _SPM_FILE, aside / _SPM_FILE)  # some programs read only that
        _write_json(aside / RECEIPT, {"origin": str(source), "converted_from": "internlm2"})
    return Path(target).expanduser()


def restore_internlm2(llama: str | Path, target: str | Path, *, like: str | Path) -> Path:
    """Writes a Llama-form folder back in InternLM2's layout, for programs that know only that.

    Args:
        llama: a folder in Llama form: a converted, trained or merged model.
        target: made here; must not hold anything.
        like: the published folder: its code files, tokenizer and further settings are copied.

    Returns:
        The folder written.

    Raises:
        FileExistsError: ``target`` is not empty.
        ValueError: ``llama`` is no Llama model that InternLM2 has a place for, or ``like`` is no
            InternLM2 folder.
    """
    from xtuner_lite.models.internlm2 import internlm2_tensors, to_internlm2_config
    from xtuner_lite.models.shards import WeightFiles, write_shards

    llama, like = Path(llama).expanduser(), Path(like).expanduser()
    if not has_internlm2_layout(like):
        raise ValueError(f"{like} is no InternLM2 folder as published; give the one with its code")
    settings = to_internlm2_config(_read_json(llama / _CONFIG), str(llama / _CONFIG))
    config = _read_json(like / _CONFIG) | settings
    with _written_aside(target) as aside:
        shutil.copytree(like, aside, ignore=_ignore_weights, dirs_exist_ok=True)
        with WeightFiles(llama) as files:
            write_shards(internlm2_tensors(files, config), aside)
        _write_json(aside / _CONFIG, config)
    return Path(target).expanduser()


def _write_generation_config(
    source: Path, target: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None
) -> None:
    """The published one; generation stops at EOS and at the end of a turn."""
    file = source / _GENERATION_CONFIG
    settings = _read_json(file) if file.is_file() else {}
    stops = settings.get("eos_token_id", config.get("eos_token_id", 2))
    stops = [stops] if isinstance(stops, int) else list(stops)
    end_of_turn = None if tokenizer is None else tokenizer.get_vocab().get("<|im_end|>")
    if end_of_turn is not None and end_of_turn not in stops:
        stops.append(end_of_turn)
    settings["eos_token_id"] = stops
    for key in ("bos_token_id", "pad_token_id"):
        if config.get(key) is not None:
            settings.setdefault(key, config[key])
    _write_json(target / _GENERATION_CONFIG, settings)


def _write_tokenizer(tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    tokenizer.save_pretrained(str(target))
    settings = _read_json(target / _TOKENIZER_CONFIG)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # known to older readers too
    for machine_dependent in ("is_local", "local_files_only", "backend"):
        settings.pop(machine_dependent, None)
    _write_json(target / _TOKENIZER_CONFIG, settings)


@contextmanager
def _written_aside(target: str | Path) -> Iterator[Path]:
    """A folder on the disk of ``target`` that becomes it when the block ends without an error."""
    target = Path(target).expanduser()
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty and was left as it is; give another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as temporary:
        aside = Path(temporary) / "ready"
        aside.mkdir()
        yield aside
        if target.exists():
            target.rmdir()
        aside.rename(target)


def _digest(folder: Path) -> str:
    """8 hexadecimal digits of what the folder's form depends on: config, names, sizes, dates."""
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    digest.update(str(folder.resolve()).encode())
    for path in sorted(folder.iterdir()):
        if path.name.endswith((*_WEIGHTS, _SPM_FILE, _TOKENIZER_CONFIG)):
            info = path.stat()
            digest.update(f"{path.name} {info.st_size} {info.st_mtime_ns}".encode())
    return digest.hexdigest()[:8]


def _ignore_weights(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(_WEIGHTS)]


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
