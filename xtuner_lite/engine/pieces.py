"""Training state in pieces: which part of which parameter a rank holds, and what belongs to it.

Every strategy describes its part of the weights and of the optimizer as pieces: ``[start, stop)``
of the parameter's elements in row-major order, by the parameter's name. A whole parameter, FSDP2's
rows and ZeRO's flat partitions are all pieces, so a checkpoint written by one strategy on N ranks
is read by any other on M: each asks for the elements that it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from xtuner_lite.engine.checkpoint import CheckpointError

#: Key of the weights themselves (float32 where they train) among a piece's tensors.
WEIGHT = "weight"


@dataclass
class Piece:
    """Elements ``[start, stop)`` of one parameter, and the optimizer's state for them.

    Attributes:
        name: the parameter's name in the training method.
        shape: of the whole parameter.
        start, stop: positions in the flattened parameter.
        tensors: flat tensors of ``stop - start`` elements: 'weight' and, e.g., 'exp_avg'.
        scalars: what the optimizer keeps once per parameter, e.g. 'step'; numbers or 0-dim tensors.
        opaque: state of another size (blocks of a quantised optimizer): fits the same piece only.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any] = field(default_factory=dict)
    opaque: dict[str, Tensor] = field(default_factory=dict)


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """(the part this rank holds, its first flat position in the whole tensor).

    Raises:
        NotImplementedError: a DTensor that is sharded along another dimension than the first.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(isinstance(p, Shard) and p.dim != 0 for p in tensor.placements):
        raise NotImplementedError(
            f"a parameter is sharded as {tensor.placements}; checkpoints hold pieces of rows "
            "(Shard(0)) only"
        )
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), (offsets[0] if offsets else 0) * prod(tensor.shape[1:])


def like_parameter(parameter: Tensor, local: Tensor) -> Tensor:
    """``local`` (this rank's elements) in the shape and kind of ``parameter``."""
    part, _ = local_part(parameter)
    local = local.view(part.shape)
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local.to(part.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def optimizer_pieces(optimizer: Optimizer) -> Iterator[Piece]:
    """The pieces of this rank, from an optimizer of torch over ``param_names`` groups."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            local, start = local_part(parameter)
            piece = Piece(
                name, tuple(parameter.shape), start, start + local.numel(),
                {WEIGHT: local.detach().reshape(-1)},
            )  # fmt: skip
            add_optimizer_state(piece, optimizer.state.get(parameter, {}))
            yield piece


def add_optimizer_state(piece: Piece, state: dict[str, Any]) -> None:
    """Sort the optimizer's ``state`` for the piece into elementwise, scalar and other."""
    size = piece.stop - piece.start
    local = {
        key: local_part(value)[0] if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
    tensors = {k: v for k, v in local.items() if isinstance(v, Tensor) and v.dim() > 0}
    piece.scalars.update({k: v for k, v in local.items() if k not in tensors})
    if all(value.numel() == size for value in tensors.values()):
        piece.tensors.update({k: v.detach().reshape(-1) for k, v in tensors.items()})
    else:  # elements may belong to blocks: kept together, not cut
        piece.opaque.update(tensors)


@torch.no_grad()
def load_optimizer_pieces(optimizer: Optimizer, reader: PieceReader) -> None:
    """Put weights and state of this rank's part back, as ``optimizer_pieces`` gave them.

    Raises:
        CheckpointError: a parameter is missing, has another shape, or its state cannot be cut.
    """
    numbered: dict[int, dict[str, Any]] = {}
    number = 0
    packed = []
    for group in optimizer.param_groups:
        begin = number
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            local, start = local_part(parameter)
            piece = reader.piece(name, tuple(parameter.shape), start, start + local.numel())
            local.copy_(piece.tensors.pop(WEIGHT).view(local.shape))
            state = {k: like_parameter(parameter, v) for k, v in piece.tensors.items()}
            if state or piece.opaque or piece.scalars:
                numbered[number] = {**state, **piece.opaque, **piece.scalars}
            number += 1
        packed.append({**group, "params": list(range(begin, number))})
    optimizer.load_state_dict({"state": numbered, "param_groups": packed})


def copy_to_cpu(pieces: Iterable[Piece], *, clone: bool = False) -> list[Piece]:
    """The pieces with their tensors on the CPU; ``clone``: in memory of their own."""

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach().to("cpu", copy=clone).contiguous() for k, v in tensors.items()}

    return [
        Piece(
            p.name, p.shape, p.start, p.stop, moved(p.tensors),
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in p.scalars.items()},
            moved(p.opaque),
        )
        for p in pieces
    ]  # fmt: skip


def write_pieces(folder: Path, rank: int, pieces: list[Piece]) -> None:
    """Write ``pieces_<rank>.json`` and ``.safetensors``; a rank without pieces writes nothing."""
    if not pieces:
        return
    tensors: dict[str, Tensor] = {}
    entries = []
    for piece in pieces:
        prefix = f"{piece.name}:{piece.start}:"
        tensors.update({prefix + key: value for key, value in piece.tensors.items()})
        tensors.update({f"{prefix}opaque:{key}": value for key, value in piece.opaque.items()})
        entries.append(
            {
                "name": piece.name, "shape": list(piece.shape),
                "start": piece.start, "stop": piece.stop,
                "tensors": sorted(piece.tensors), "opaque": sorted(piece.opaque),
                "scalars": {k: _encode_scalar(v) for k, v in piece.scalars.items()},
            }
        )  # fmt: skip
    save_file(tensors, folder / f"pieces_{rank:05d}.safetensors")
    (folder / f"pieces_{rank:05d}.json").write_text(json.dumps(entries), encoding="utf-8")


class PieceReader:
    """Reads any elements of any parameter out of the pieces in a checkpoint's trainer folder.

    Args:
        folder: the folder that ``write_pieces`` wrote into, once per rank.

    Raises:
        CheckpointError: there are no pieces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("pieces_*.json")):
            for entry in json.loads(path.read_text(encoding="utf-8")):
                entry["file"] = path.with_suffix(".safetensors")
                self._entries.setdefault(entry["name"], []).append(entry)
        if not self._entries:
            raise CheckpointError(f"{folder} holds no training state (pieces_*.json)")
        for entries in self._entries.values():
            entries.sort(key=lambda entry: entry["start"])
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return list(self._entries)

    def piece(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Piece:
        """Elements ``[start, stop)`` of parameter ``name``, on the CPU.

        Raises:
            CheckpointError: the parameter is missing or has another shape; elements are missing;
                its optimizer state is of another size and was cut otherwise.
        """
        entries = self._entries.get(name)
        if entries is None or tuple(entries[0]["shape"]) != tuple(shape):
            got = "is missing" if entries is None else f"has shape {tuple(entries[0]['shape'])}"
            raise CheckpointError(
                f"{self.folder}: weight {name} {got}, the model needs {tuple(shape)}. Resume with "
                "the model and adapter settings of the saved run."
            )
        keys = entries[0]["tensors"]
        if entries[0]["opaque"]:
            return self._whole_piece(name, tuple(shape), start, stop, entries)
        parts: dict[str, list[Tensor]] = {key: [] for key in keys}
        position = start
        for entry in entries:
            begin, end = max(start, entry["start"]), min(stop, entry["stop"])
            if begin >= end:
                continue
            if begin != position:
                break
            for key in keys:
                name_of_tensor = f"{name}:{entry['start']}:{key}"
                stored = self._file(entry["file"]).get_slice(name_of_tensor)
                parts[key].append(stored[begin - entry["start"] : end - entry["start"]])
            position = end
        if position != stop:
            raise CheckpointError(
                f"{self.folder}: elements {position} to {stop} of weight {name} are missing; the "
                "file of a rank was lost. Use another checkpoint."
            )
        tensors = {k: torch.cat(v) if v else torch.empty(0) for k, v in parts.items()}
        return Piece(name, tuple(shape), start, stop, tensors, _scalars(entries[0]))

    def _whole_piece(
        self, name: str, shape: tuple[int, ...], start: int, stop: int, entries: list[dict]
    ) -> Piece:
        for entry in entries:
            if (entry["start"], entry["stop"]) != (start, stop):
                continue
            file, prefix = self._file(entry["file"]), f"{name}:{start}:"
            return Piece(
                name, shape, start, stop,
                {key: file.get_tensor(prefix + key) for key in entry["tensors"]},
                _scalars(entry),
                {key: file.get_tensor(f"{prefix}opaque:{key}") for key in entry["opaque"]},
            )  # fmt: skip
        raise CheckpointError(
            f"{self.folder}: the optimizer's state of {name} is kept in blocks and cannot be cut "
            "anew. Resume with the strategy and the number of processes of the saved run, or start "
            "a new run from its weights with --load-from."
        )

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


def _encode_scalar(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"the optimizer keeps a {type(value).__name__} per parameter; a checkpoint stores tensors "
        "and plain numbers only"
    )


def _scalars(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        key: torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]))
        if isinstance(value, dict)
        else value
        for key, value in entry["scalars"].items()
    }


def parameter_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups' settings and ``param_names``, without the parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def load_parameter_groups(optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
    """Put the groups' settings back (learning rates, betas ...).

    Raises:
        CheckpointError: other groups than the saved run's.
    """
    own = [list(group["param_names"]) for group in optimizer.param_groups]
    theirs = [list(group["param_names"]) for group in saved]
    if own != theirs:
        raise CheckpointError(
            f"the saved optimizer has {len(theirs)} parameter groups of sizes "
            f"{[len(g) for g in theirs]}, this run {len(own)} of sizes {[len(g) for g in own]}. "
            "Resume with the model, adapter and paramwise_cfg of the saved run, or start a new run "
            "from its weights with --load-from."
        )
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({k: v for k, v in values.items() if k != "params"})


def trainable_names(model: nn.Module) -> set[str]:
    """Names of what trains and of the buffers: what a checkpoint must hold."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return names | {name for name, _ in model.named_buffers()}
