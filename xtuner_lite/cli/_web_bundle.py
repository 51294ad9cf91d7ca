"""A folder that shows the page of `web-demo` on a Hugging Face Space or OpenXLab."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import xtuner_lite
from xtuner_lite.chat.image_models import sees_images
from xtuner_lite.models.hub import ADAPTER_CONFIG, WHEEL_PREFIX

#: What the page imports itself; the rest comes with these.
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "sentencepiece",
    "mmengine",
    "gradio",
)
_LARGE = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.model", "tokenizer.json")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

_APP = '''"""Starts the page: the command `xtuner-lite web-demo` with the arguments below."""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
os.chdir(FOLDER)
sys.path.insert(0, str(FOLDER))

from xtuner_lite.cli.main import main  # noqa: E402

ARGUMENTS = [
{arguments}
]

# On a Space everyone who may open it comes in. Set the secret XTUNER_LITE_WEB_PASSWORD there to
# make the page ask for a password. Elsewhere only this machine reaches it, unless
# GRADIO_SERVER_NAME says otherwise.
is_space = os.environ.get("SYSTEM") == "spaces"
host = os.environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if is_space else "127.0.0.1")
port = os.environ.get("GRADIO_SERVER_PORT") or ("7860" if is_space else "")
ARGUMENTS += ["--host", host, *(["--port", port] if port else [])]
if not os.environ.get("XTUNER_LITE_WEB_PASSWORD"):
    ARGUMENTS.append("--no-password")

if __name__ == "__main__":
    sys.exit(main(["web-demo", *ARGUMENTS]))
'''

_README = """---
title: {title}
emoji: 💬
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
pinned: false
{models}---

# {name}

A page to talk to {what}. Written by `xtuner-lite web-demo --bundle`.

Try it here:

    pip install -r requirements.txt
    python app.py

Publish it as a Space:

    hf auth login
    hf repos create OWNER/NAME --repo-type space --space-sdk gradio
    hf upload OWNER/NAME . . --repo-type space

`.gitattributes` is for those who push it with git and git-lfs instead.

OpenXLab takes the same files. Look at the licences of the model and of the data it was trained on
before you publish it.
"""


def write_bundle(args: argparse.Namespace, *, bot_name: str) -> str:
    """Writes the folder ``args.bundle``; returns what to do with it.

    Local models and adapters are copied; hub ids and known wheels are fetched where it runs.

    Args:
        args: those of ``web-demo``.
        bot_name: title of the page.

    Raises:
        ExportError: the folder is not empty, or the model or adapter is no such folder.
    """
    from xtuner_lite.export.publish import ExportError, publishing

    out = Path(args.bundle).expanduser()
    if out.is_dir() and any(out.iterdir()):
        raise ExportError(f"{out} is not empty; name a folder that does not exist yet")
    with publishing(out) as folder:
        model, adapter = _put_weights(args, folder)
        template = _put_template(args, folder)
        arguments = _arguments(args, model, adapter, template, bot_name)
        lines = "\n".join(f"    {json.dumps(word, ensure_ascii=False)}," for word in arguments)
        _write(folder / "app.py", _APP.format(arguments=lines))
        sees = sees_images(folder / model) if model == "model" else None
        _write(folder / "requirements.txt", _requirements(args, model, sees=sees))
        _write(folder / "README.md", _readme(bot_name, model, adapter))
        attributes = [f"{pattern} filter=lfs diff=lfs merge=lfs -text" for pattern in _LARGE]
        _write(folder / ".gitattributes", "\n".join(attributes) + "\n")
        _put_package(folder)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return (
        f"{out} is ready ({size / 1e6:.1f} MB). Try it: python {out / 'app.py'}\n"
        f"How to publish it: {out / 'README.md'}"
    )


def _put_weights(args: argparse.Namespace, folder: Path) -> tuple[str, str | None]:
    """Copies what is local; returns (MODEL, --adapter) as they are called inside the folder."""
    from xtuner_lite.export.copies import copy_checkpoint
    from xtuner_lite.export.publish import RECEIPT, ExportError
    from xtuner_lite.export.sources import adapter_folder, newest_checkpoint
    from xtuner_lite.models.llava_files import is_llava_run
    from xtuner_lite.models.loading import split_adapter_path

    if args.llava is not None or is_llava_run(newest_checkpoint(args.model)):
        raise ExportError(
            f"{args.llava or args.model} is the run of a LLaVA, whose parts lie elsewhere; make "
            "one folder of it first, and bundle that: xtuner-lite convert llava"
        )
    base, own = split_adapter_path(newest_checkpoint(args.model))
    if own is not None and args.adapter is not None:
        raise ExportError(
            f"{args.model} is an adapter of {base!r} itself, and another one is given; name the "
            "base model as MODEL, or leave --adapter out"
        )
    model = _wheel_of(base) or base
    if Path(model).expanduser().is_dir():
        copy_checkpoint(model, folder / "model")
        model = "model"
    elif not model.startswith(WHEEL_PREFIX) and not _HUB_ID.fullmatch(model):
        raise ExportError(f"no model folder {model!r}; give a folder, a hub id or a known wheel")
    adapter = args.adapter if own is None else own
    if adapter is not None:
        copy_checkpoint(adapter_folder(adapter), folder / "adapter")
        file = folder / "adapter" / ADAPTER_CONFIG
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = model  # not the folder of this machine
        _write(file, json.dumps(settings, indent=2) + "\n")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # names that folder too
    for receipt in folder.glob(f"*/{RECEIPT}"):  # of the files before this change
        receipt.unlink()
    return model, None if adapter is None else "adapter"


def _wheel_of(model: str) -> str | None:
    """The wheel that a model is, also where it is named by its folder in this machine's cache."""
    from xtuner_lite.export.publish import ExportError
    from xtuner_lite.models.wheels import KNOWN_WHEELS, wheel_folder

    known = [WHEEL_PREFIX + requirement for requirement in KNOWN_WHEELS]
    if model.startswith(WHEEL_PREFIX) and model not in known:
        raise ExportError(f"no model is known in {model!r}; known wheels: {', '.join(known)}")
    for name, wheel in zip(known, KNOWN_WHEELS.values()):
        if model == name or Path(model).expanduser().absolute() == wheel_folder(wheel).absolute():
            return name
    return None


def _put_template(args: argparse.Namespace, folder: Path) -> str | None:
    given = args.prompt_template
    if given is None or not Path(given).is_file():
        return given
    shutil.copyfile(given, folder / "template.jinja")
    return "template.jinja"


def _put_package(folder: Path) -> None:
    """Puts this package beside app.py: a Space installs requirements before it has files."""
    source = Path(xtuner_lite.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "configs")
    shutil.copytree(source, folder / "xtuner_lite", ignore=ignored)
    licence = source.parent / "LICENSE"
    if licence.is_file():
        shutil.copyfile(licence, folder / "xtuner_lite" / "LICENSE")


def _arguments(
    args: argparse.Namespace, model: str, adapter: str | None, template: str | None, bot_name: str
) -> list[str]:
    """The words of the command, one an option."""
    options = {
        "--adapter": adapter,
        "--prompt-template": template,
        "--bits": args.bits,
        "--torch-dtype": None if args.torch_dtype == "auto" else args.torch_dtype,
        "--hub": args.hub,
        "--bot-name": bot_name,
        "--lang": args.lang,
        "--system": args.system or None,
        "--max-characters": args.max_characters,
        "--temperature": args.temperature,
        "--top-p": args.top_p,
        "--top-k": args.top_k,
        "--repetition-penalty": args.repetition_penalty,
        "--max-new-tokens": args.max_new_tokens,
        "--seed": args.seed,
    }
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    switches = {"--compare": args.compare, "--trust-remote-code": args.trust_remote_code}
    return [model, *words, *(name for name, is_on in switches.items() if is_on)]


def _requirements(args: argparse.Namespace, model: str, *, sees: bool | None) -> str:
    """What pip installs there.

    Args:
        args: those of ``web-demo``.
        model: MODEL as it is called inside the folder.
        sees: whether it reads images; None: it is fetched there, and not known here.
    """
    names = list(PACKAGES)
    if sees is not False:  # what image processors need; the second one not all of them
        names += ["pillow"]
        names += ["torchvision"] if importlib.util.find_spec("torchvision") else []
    names += ["gguf"] if model.startswith(WHEEL_PREFIX) else []
    names += ["bitsandbytes"] if args.bits else []
    names += ["modelscope"] if args.hub == "modelscope" else []
    # Without what a build adds ('+cpu'), which the public index does not have.
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in names)


def _readme(bot_name: str, model: str, adapter: str | None) -> str:
    is_id = model != "model" and not model.startswith(WHEEL_PREFIX)
    what = "the model in `model/`" if model == "model" else f"`{model}`"
    return _README.format(
        title=json.dumps(bot_name, ensure_ascii=False),
        gradio=version("gradio"),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        models=f"models:\n- {model}\n" if is_id and "/" in model else "",
        name=bot_name,
        what=what + (" with the adapter in `adapter/`" if adapter else ""),
    )


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
