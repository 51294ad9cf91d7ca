"""safetensors files read and written one tensor at a time, with plain file reads.

The library maps files into memory: every page that was touched counts as this process's own until
the system takes it back. Plain reads keep the memory of an export at one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xtuner_lite.export.publish import ExportError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # bytes; safetensors' own limit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor before it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0
    """Bytes from the start of the file."""

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightFiles:
    """The tensors of a model or adapter in safetensors form.

    Args:
        files: the files, in order.

    Raises:
        ExportError: a file is damaged, or two files hold a tensor of the same name.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.infos: dict[str, TensorInfo] = {}
        self.overrides: dict[str, tuple[WeightFiles, str]] = {}
        """name -> (files, name there): tensors to be taken from elsewhere."""
        for file in self.files:
            for info in read_header(file):
                if info.name in self.infos:
                    raise ExportError(
                        f"{file.name} and {self.infos[info.name].file} both hold {info.name}; "
                        "remove the file that does not belong to the model"
                    )
                self.infos[info.name] = info

    @classmethod
    def of_model(cls, folder: Path) -> WeightFiles | None:
        """Those of a model folder; None where its weights have another form.

        Raises:
            ExportError: a shard of the index is missing.
        """
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ExportError(
                    f"{folder} is not whole: {INDEX} names {', '.join(missing[:3])}, which is not "
                    "there; fetch or copy the model again"
                )
            return cls(folder / name for name in names)
        if (folder / WEIGHTS).is_file():
            return cls([folder / WEIGHTS])
        return None

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.num_bytes for info in self.infos.values())

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        if name in self.overrides:
            files, other = self.overrides[name]
            return files.read(other)
        info = self.infos[name]
        buffer = torch.empty(info.num_bytes, dtype=torch.uint8)
        if info.num_bytes:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.offset)
                view = memoryview(buffer.numpy())
                done = 0
                while done < info.num_bytes:
                    count = file.readinto(view[done : done + (64 << 20)])
                    if not count:
                        raise ExportError(f"{info.file} ends inside {name}; fetch or copy it again")
                    done += count
        return buffer.view(info.dtype).reshape(info.shape)


def read_header(file: Path) -> Iterator[TensorInfo]:
    """What a safetensors file holds, in the order of its data.

    Raises:
        ExportError: the file is damaged, or holds a type of number this project does not know.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ExportError(f"{file} is no safetensors file, or is cut short; fetch it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            end = max((entry["data_offsets"][1] for _, entry in entries), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{file} has a damaged header ({error}); fetch it again") from error
    if size < 8 + length + end:
        raise ExportError(f"{file} is cut short: {size} bytes, {8 + length + end} expected")
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ExportError(
                f"{file} holds {name} as {entry['dtype']}; known: {', '.join(_DTYPES)}. Give the "
                "model in full precision"
            )
        begin, stop = entry["data_offsets"]
        info = TensorInfo(
            name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), file, 8 + length + begin
        )
        if stop - begin != info.num_bytes:
            raise ExportError(f"{file} has a damaged header: the size of {name} is wrong")
        yield info


def write_tensors(file: Path, infos: list[TensorInfo], tensors: Iterable[Tensor]) -> None:
    """Writes a safetensors file; ``tensors`` are taken one at a time, in the order of ``infos``."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for info in infos:
        offsets = [at, at + info.num_bytes]
        header[info.name] = {
            "dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets,
        }  # fmt: skip
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for info, tensor in zip(infos, tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), info.name
            if info.num_bytes:
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                stream.write(memoryview(flat.numpy()))


def plan_shards(infos: Iterable[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Tensors in files of at most ``max_bytes`` each; a larger tensor has a file of its own."""
    shards: list[list[TensorInfo]] = []
    size = 0
    for info in infos:
        if not shards or (size and size + info.num_bytes > max_bytes):
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.num_bytes
    return shards


def shard_names(num_shards: int) -> list[str]:
    """The names transformers gives to the files of a model."""
    if num_shards == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]


def write_index(folder: Path, shards: list[list[TensorInfo]]) -> None:
    """Writes model.safetensors.index.json; nothing for a single file."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    total = sum(info.num_bytes for shard in shards for info in shard)
    weight_map = {info.name: name for shard, name in zip(shards, names) for info in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def parse_size(text: str | int) -> int:
    """Bytes of '5GB', '500MB', '2GiB' or a number.

    Raises:
        ExportError: it is no size, or not above 0.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20,
             "gib": 2**30}  # fmt: skip
    word = str(text).strip().lower()
    number = word.rstrip("bgikm ")
    unit = word[len(number) :].strip()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ExportError(f"{text!r} is no size; write it like '5GB', '500MB' or '2GiB'")
    return size
