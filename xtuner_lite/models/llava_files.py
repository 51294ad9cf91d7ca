"""The folder of a LLaVA run: what was trained, and a note of the parts that were not.

    llava.json                     the parts and how they are put together
    projector/                     in XTuner's form: config.json, model.safetensors (model.0.weight)
    adapter_model.safetensors      of llm_lora and visual_encoder_lora, with adapter_config.json
    visual_encoder/                the vision tower, where it was trained in full

A run that trains the language model in full writes an ordinary Hugging Face LLaVA folder instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner_lite.models.hub import ADAPTER_CONFIG, LLAVA_JSON, MODEL_CONFIG, PROJECTOR_DIR
from xtuner_lite.models.pth import SUFFIXES as PTH_SUFFIXES
from xtuner_lite.models.pth import read_pth

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

VISUAL_ENCODER_DIR = "visual_encoder"
_PROJECTOR_WEIGHTS = "model.safetensors"
#: Projector weights in files: XTuner's numbering counts activations too; LLaVA's own repository
#: calls it mm_projector; transformers numbers layers from 1.
_SEQUENTIAL = re.compile(r"(?:^|.*projector\.)(?:model\.)?(\d+)\.(weight|bias)$")
_NUMBERED = re.compile(r"(?:^|.*projector\.)(linear_\d+\.(?:weight|bias))$")


@dataclass(frozen=True)
class LlavaParts:
    """What a LLaVA is made of, beside the weights of its run."""

    llm: str
    visual_encoder: str
    projector_depth: int
    visual_select_layer: int
    visual_select_strategy: str
    image_token_id: int
    image_seq_length: int | None  # None: of the tower's image size

    def building(self) -> dict[str, Any]:
        """How the parts are put together: the keywords of build_llava."""
        return {k: v for k, v in asdict(self).items() if k not in ("llm", "visual_encoder")}

    def write(self, folder: Path) -> None:
        """Writes ``llava.json``."""
        text = json.dumps({"format": 1, **asdict(self)}, indent=2) + "\n"
        (folder / LLAVA_JSON).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> LlavaParts:
        """Reads ``llava.json``.

        Raises:
            ValueError: it is not the file that ``write`` makes.
        """
        try:
            saved = json.loads((folder / LLAVA_JSON).read_text(encoding="utf-8"))
            return cls(**{field.name: saved[field.name] for field in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / LLAVA_JSON} is not what a LLaVA run writes ({error!r}); take the "
                "folder of a checkpoint as it was saved"
            ) from error


def is_llava_run(path: str | Path) -> bool:
    """Whether a path is the folder of a LLaVA run, which has to be put together of its parts."""
    folder = Path(path).expanduser()
    return (folder / LLAVA_JSON).is_file() and not (folder / MODEL_CONFIG).is_file()


def parts_of(config: LlavaConfig, llm: str, visual_encoder: str) -> LlavaParts:
    """The note about a LLaVA of this config whose parts were loaded from these paths."""
    return LlavaParts(
        llm=lasting_path(llm),
        visual_encoder=lasting_path(visual_encoder),
        projector_depth=getattr(config, "projector_depth", 2),
        visual_select_layer=config.vision_feature_layer,
        visual_select_strategy=config.vision_feature_select_strategy,
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
    )


def open_llava_run(
    path: str | Path,
    *,
    llm: str | Path | None = None,
    visual_encoder: str | Path | None = None,
    dtype: Any = None,
    quantization: Any = None,
    attn: Any = "auto",
) -> LlavaForConditionalGeneration | PeftModel:
    """The LLaVA of a run's folder, put together of its parts, with what was trained in it.

    Args:
        path: a checkpoint folder with llava.json.
        llm: where the language model lies now; None: where it lay.
        visual_encoder: the same of the vision tower; one that was trained in full is in ``path``.
        dtype: see load_image_text_model, like ``quantization`` and ``attn``.

    Raises:
        FileNotFoundError: a part is no longer where it lay.
        ValueError: the weights do not fit the parts.
    """
    from xtuner_lite.models.llava import build_llava, load_visual_encoder
    from xtuner_lite.models.loading import load_adapter, load_causal_lm

    folder = Path(path).expanduser()
    parts = LlavaParts.read(folder)
    own_tower = folder / VISUAL_ENCODER_DIR
    if own_tower.is_dir():
        visual_encoder = own_tower
    places = {"llm": llm or parts.llm, "visual_encoder": visual_encoder or parts.visual_encoder}
    for name, place in places.items():
        if not place:
            raise ValueError(
                f"{folder / LLAVA_JSON} does not say where {name} lies (it was given to the run as "
                f"a model, not as a path); name it: {name}=..."
            )
    try:
        text = load_causal_lm(places["llm"], dtype=dtype, quantization=quantization, attn=attn)
        tower = load_visual_encoder(places["visual_encoder"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"a part of the LLaVA in {folder} is not where {LLAVA_JSON} says: {error} Name its "
            "place now: llm=... or visual_encoder=..."
        ) from error
    model = build_llava(text, tower, **parts.building())
    load_projector(model.model.multi_modal_projector, read_projector(folder), folder)
    # What an adapter trained on top would name as its base.
    model.name_or_path = model.config._name_or_path = str(folder.resolve())
    if (folder / ADAPTER_CONFIG).is_file():
        return load_adapter(model, folder)
    return model.eval()


def save_projector(
    projector: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a projector as XTuner does: config.json and model.safetensors.

    Args:
        projector: of a LLaVA.
        folder: made when absent.
        state_dict: whole tensors by the names of ``projector.state_dict()``; None takes its own.
    """
    from safetensors.torch import save_file

    state = projector.state_dict() if state_dict is None else state_dict
    tensors = {}
    for name, tensor in state.items():
        index, kind = re.fullmatch(r"linear_(\d+)\.(\w+)", name).groups()
        tensors[f"model.{2 * int(index) - 2}.{kind}"] = tensor.detach().cpu().contiguous()
    first = state["linear_1.weight"]
    config = {
        "architectures": ["ProjectorModel"],
        "model_type": "projector",
        "visual_hidden_size": first.shape[1],
        "llm_hidden_size": first.shape[0],
        "depth": len([name for name in state if name.endswith(".weight")]),
        "hidden_act": "gelu",
        "bias": "linear_1.bias" in state,
        "dtype": str(first.dtype).removeprefix("torch."),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / MODEL_CONFIG).write_text(text, encoding="utf-8")
    save_file(tensors, str(folder / _PROJECTOR_WEIGHTS), metadata={"format": "pt"})


def read_projector(path: str | Path) -> dict[str, Tensor]:
    """A projector's tensors by transformers' names (linear_1.weight, ...).

    Args:
        path: the folder of a LLaVA run or of XTuner's ``projector``, or a file of either's, a
            .safetensors or (through the restricted loader) .pth, .pt or .bin.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no projector, or more than one.
    """
    path = Path(path).expanduser()
    file = _projector_file(path)
    if file.suffix in PTH_SUFFIXES:
        tensors = read_pth(file)
    else:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(str(file))
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged, or no .safetensors file ({error}); take another checkpoint"
            ) from error
    found, others = {}, []
    for name, tensor in tensors.items():
        if match := _NUMBERED.match(name):
            found[match[1]] = tensor
        elif (match := _SEQUENTIAL.match(name)) and int(match[1]) % 2 == 0:
            found[f"linear_{int(match[1]) // 2 + 1}.{match[2]}"] = tensor
        else:
            others.append(name)
    if not found:
        raise ValueError(
            f"{file} holds no projector (looked for projector.model.0.weight, model.0.weight and "
            f"linear_1.weight); it holds {', '.join(sorted(tensors)[:3])}"
        )
    if others:
        raise ValueError(
            f"{file} holds more than a projector ({', '.join(sorted(others)[:3])}, "
            f"{len(others)} tensors), and only the projector could be taken; give a file of the "
            "projector alone, or the whole model to load_image_text_model"
        )
    return found


def load_projector(projector: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copies tensors of ``read_projector`` into a projector.

    Raises:
        ValueError: they are of another width or depth, with both named.
    """
    own = projector.state_dict()
    theirs, ours = _shape_of(tensors), _shape_of(own)
    if theirs != ours or set(tensors) != set(own):
        raise ValueError(
            f"the projector in {source} does not fit: it takes features {theirs[0]} wide (those of "
            f"its vision tower), gives embeddings {theirs[1]} wide and has {theirs[2]} layer(s); "
            f"here the vision tower is {ours[0]} wide, the llm {ours[1]} and projector_depth is "
            f"{ours[2]}. Use the visual_encoder, llm and projector_depth it was trained with"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def tower_differs(tower: PreTrainedModel, folder: Path) -> bool:
    """Whether the vision tower saved in ``folder`` has other weights than this one."""
    from xtuner_lite.models.llava import load_visual_encoder

    saved = load_visual_encoder(folder).state_dict()
    own = {name.replace(".base_layer.", "."): value for name, value in tower.state_dict().items()}
    return any(
        name not in own
        or own[name].shape != value.shape
        or not torch.equal(own[name].cpu(), value.to(own[name].dtype))
        for name, value in saved.items()
    )


def _projector_file(path: Path) -> Path:
    if path.is_file():
        return path
    folders = (path / PROJECTOR_DIR, path)
    names = (_PROJECTOR_WEIGHTS, "pytorch_model.bin", "projector.safetensors")
    for file in (folder / name for folder in folders for name in names):
        if file.is_file():
            return file
    what = "holds no projector" if path.is_dir() else "is not there"
    if (path / "checkpoints").is_dir():
        what = "is a work_dir, which holds its checkpoints in checkpoints/"
    raise FileNotFoundError(
        f"{path} {what}; give the checkpoint folder of a LLaVA run, XTuner's projector folder, or "
        "a projector's file (.safetensors, .pth)"
    )


def _shape_of(tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """(width of the features, width of the embeddings, layers); 0 where there is no layer."""
    layers = sorted(name for name in tensors if name.endswith(".weight"))
    first = tensors.get("linear_1.weight")
    if first is None:
        return 0, 0, len(layers)
    return first.shape[1], first.shape[0], len(layers)


def lasting_path(path: str) -> str:
    """A local folder by its whole path, so that it is found from other folders; ids as they are."""
    folder = Path(path).expanduser() if path else None
    return str(folder.resolve()) if folder is not None and folder.exists() else path
