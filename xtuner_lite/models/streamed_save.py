"""A whole model written tensor by tensor: the folder that transformers writes, without holding it.

For models whose weights lie in parts on many ranks. transformers' ``save_pretrained`` wants all
tensors of the model at once; here the names, files and positions are planned from the shapes alone,
and each tensor goes to its place in its file as it comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner_lite.models.modes import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: torch's dtypes -> safetensors' names for them.
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a file: its name in ``model.state_dict()``, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SavePlan:
    """The weight files of a model folder.

    Attributes:
        files: file name -> its tensors, in the order in which they are written.
        index: content of model.safetensors.index.json; None where one file holds all.
    """

    files: dict[str, tuple[PlannedTensor, ...]]
    index: dict[str, Any] | None

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order in which ``write_planned`` takes them."""
        return [tensor.name for tensors in self.files.values() for tensor in tensors]


def plan_save(
    model: PreTrainedModel,
    max_shard_size: int | str = "5GB",
    *,
    trained_dtype: torch.dtype | None = None,
) -> SavePlan | None:
    """What ``model.save_pretrained`` would write into which file.

    Args:
        model: its parameters may be sharded (DTensors, or ZeRO-3's); only shapes are read.
        trained_dtype: of what trains, where it is kept apart from the model (ZeRO); None: as it is.
        max_shard_size: of a file, as transformers': '5GB', or bytes. A larger tensor gets a file
            of its own.

    Returns:
        None where transformers renames, merges or packs tensors on the way to the disk: it needs
        all of them for that.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in (model._keys_to_ignore_on_save or ())
    }
    kept = _without_tied(model, state)
    if kept is None or getattr(model, "hf_quantizer", None) is not None:
        return None
    shapes = {}
    for name, tensor in kept.items():
        dtype = trained_dtype if trained_dtype and tensor.requires_grad else tensor.dtype
        shapes[name] = torch.empty(_whole_shape(tensor), dtype=dtype, device="meta")
    if _is_converted(model, shapes) or any(t.dtype not in _DTYPE_NAMES for t in shapes.values()):
        return None
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    index = None
    if split.is_sharded:
        total = sum(prod(_whole_shape(parameter)) for parameter in model.parameters())
        index = {
            "metadata": {"total_parameters": total, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
    # safetensors' own order: wide dtypes first, so that each tensor begins at a multiple of its own
    files = {
        file: tuple(
            PlannedTensor(name, tuple(shapes[name].shape), shapes[name].dtype)
            for name in sorted(names, key=lambda name: (-shapes[name].dtype.itemsize, name))
        )
        for file, names in split.filename_to_tensors.items()
    }
    return SavePlan(files, index)


def write_planned(
    model: PreTrainedModel, folder: Path, plan: SavePlan, weights: Iterable[Tensor]
) -> None:
    """Write config.json, generation_config.json and the weights; one tensor is held at a time.

    After an error (a full disk) the rest of ``weights`` is still drawn, because other ranks take
    part in gathering it; then the error is raised.

    Args:
        model: the model.
        folder: made when absent.
        plan: of ``plan_save``.
        weights: the whole tensors of ``plan.names``, in their order, on the CPU.
    """
    tensors = iter(weights)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(model, folder)
        for file, planned in plan.files.items():
            _write_file(folder / file, planned, tensors)
        if plan.index is not None:
            text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    finally:
        for _ in tensors:
            pass


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    # With one number for all weights: what else belongs into the folder is transformers' business.
    with without_progress_bars():
        model.save_pretrained(str(folder), state_dict={"placeholder": torch.zeros(1)})
    (folder / "model.safetensors").unlink()


def _write_file(path: Path, planned: tuple[PlannedTensor, ...], tensors: Iterator[Tensor]) -> None:
    """A safetensors file: length of the header (8 bytes), the header (JSON), the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in planned:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected in planned:
            tensor = next(tensors)
            if (tuple(tensor.shape), tensor.dtype) != (expected.shape, expected.dtype):
                raise RuntimeError(
                    f"{expected.name}: {expected.dtype} {list(expected.shape)} was announced, "
                    f"{tensor.dtype} {list(tensor.shape)} came"
                )
            # A dtype that numpy does not know (bfloat16) is bytes like any other.
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            del tensor  # before the next one comes


def _without_tied(model: PreTrainedModel, state: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Each tied tensor once, under the name that transformers keeps; None where it would not know.

    transformers finds tied tensors by their memory, which parts of tensors do not share reliably.
    """
    patterns = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key in (getattr(module, "_tied_weights_keys", None) or ())
    ]
    names_of: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            return None
        names_of.setdefault(id(tensor), []).append(name)
    kept = dict(state)
    for names in names_of.values():
        targets = [n for n in sorted(names) if any(re.search(p, n) for p in patterns)]
        dropped = targets[: len(names) - 1]
        if len(names) - len(dropped) > 1:
            return None
        for name in dropped:
            del kept[name]
    return kept


def _is_converted(model: PreTrainedModel, shapes: dict[str, Tensor]) -> bool:
    from transformers.core_model_loading import revert_weight_conversion

    written = revert_weight_conversion(model, dict(shapes))
    same_names = written.keys() == shapes.keys()
    return not same_names or any(written[name] is not tensor for name, tensor in shapes.items())


def _whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Of a ZeRO-3 parameter too, which is empty and keeps its shape aside."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
